"""Faster ways to the bits that a format's definition gives: C++ on the CPU, Triton on CUDA; all optional."""
