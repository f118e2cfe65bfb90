"""What a script trains: recipes of configs/recipes/, and the folders that their runs are kept in."""

from fairseq_dsq.recipes.recipe import FOLDER, Glue, LanguageModel, Recipe, Tabled, Translation, load_recipe

__all__ = ["FOLDER", "Glue", "LanguageModel", "Recipe", "Tabled", "Translation", "load_recipe"]
