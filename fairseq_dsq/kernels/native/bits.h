// Codes of `width` bits each to packed bytes and back, little-endian.
#pragma once

#include "lanes.h"

namespace {

INLINE int64_t bytes_of(int64_t values, int bits) { return (values * bits + 7) / 8; }

// One byte per code to `width` bits per code and back, eight codes in a word: neighbours close up, then pairs, then
// fours. Bytes that hold less than their width have 0 above it.
INLINE uint64_t close_up(uint64_t w, int width) {
    int gap = 8 - width;
    w = (w & 0x00ff00ff00ff00ffu) | (w & 0xff00ff00ff00ff00u) >> gap;
    w = (w & 0x0000ffff0000ffffu) | (w & 0xffff0000ffff0000u) >> 2 * gap;
    return (w & 0x00000000ffffffffu) | (w & 0xffffffff00000000u) >> 4 * gap;
}
INLINE uint64_t spread_out(uint64_t w, int width) {
    int gap = 8 - width;
    uint64_t codes = (1u << width) - 1, pairs = codes | codes << width, fours = pairs | pairs << 2 * width;
    w = (w & fours) | (w << 4 * gap & 0xffffffff00000000u);
    w = (w & pairs * 0x0000000100000001u) | (w << 2 * gap & 0xffff0000ffff0000u);
    return (w & codes * 0x0001000100010001u) | (w << gap & 0xff00ff00ff00ff00u);
}

// `Word` holds eight codes of a fast width exactly.
template <class Word>
INLINE void close_up_words(const uint8_t* codes, int64_t count, uint8_t* out) {
    for (int64_t i = 0; i < count / 8; i++) {
        uint64_t w;
        memcpy(&w, codes + 8 * i, 8);
        Word word = (Word)close_up(w, sizeof(Word));
        memcpy(out + i * sizeof(Word), &word, sizeof word);
    }
}
template <class Word>
INLINE void spread_out_words(const uint8_t* from, int64_t count, uint8_t* codes) {
    for (int64_t i = 0; i < count / 8; i++) {
        Word word;
        memcpy(&word, from + i * sizeof(Word), sizeof word);
        uint64_t w = spread_out(word, sizeof(Word));
        memcpy(codes + 8 * i, &w, 8);
    }
}

// Codes, one per T, to `width` bits each, beginning and ending on whole bytes.
template <class T>
void write_bits(const T* codes, int64_t count, int width, uint8_t* out) {
    if (sizeof(T) == 1 && count % 8 == 0) {
        if (width == 2) return close_up_words<uint16_t>((const uint8_t*)codes, count, out);
        if (width == 4) return close_up_words<uint32_t>((const uint8_t*)codes, count, out);
    }
    if (width == 8 * (int)sizeof(T)) {
        memcpy(out, codes, count * sizeof(T));
        return;
    }
    uint64_t held = 0;
    int bits_held = 0;
    for (int64_t i = 0; i < count; i++) {
        held |= (uint64_t)codes[i] << bits_held;
        bits_held += width;
        if (bits_held >= 32) {
            uint32_t word = (uint32_t)held;
            memcpy(out, &word, 4);
            out += 4;
            held >>= 32;
            bits_held -= 32;
        }
    }
    for (; bits_held > 0; bits_held -= 8, held >>= 8) *out++ = (uint8_t)held;
}

template <class T>
void read_bits(const uint8_t* from, int64_t count, int width, T* codes) {
    if (sizeof(T) == 1 && count % 8 == 0) {
        if (width == 2) return spread_out_words<uint16_t>(from, count, (uint8_t*)codes);
        if (width == 4) return spread_out_words<uint32_t>(from, count, (uint8_t*)codes);
    }
    if (width == 8 * (int)sizeof(T)) {
        memcpy(codes, from, count * sizeof(T));
        return;
    }
    const uint8_t* end = from + bytes_of(count, width);
    const uint64_t mask = ~0u >> (32 - width);
    uint64_t held = 0;
    int bits_held = 0;
    for (int64_t i = 0; i < count; i++) {
        if (bits_held < width) {
            uint32_t word = 0;
            if (end - from >= 4)
                memcpy(&word, from, 4);
            else
                for (int byte = 0; from + byte < end; byte++) word |= (uint32_t)from[byte] << 8 * byte;
            from += 4;
            held |= (uint64_t)word << bits_held;
            bits_held += 32;
        }
        codes[i] = (T)(held & mask);
        held >>= width;
        bits_held -= width;
    }
}

}  // namespace
