// Codes of `width` bits each to packed bytes and back, little-endian.
#pragma once

#include "loops.h"

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

// The number of so many bytes, little-endian. In parts that are loads: copied into a longer number, each waits for its
// own stores.
template <int BYTES>
INLINE uint64_t load_bytes(const uint8_t* from) {
    uint64_t low = 0;
    if constexpr (BYTES >= 4) {
        uint32_t part;
        memcpy(&part, from, 4);
        low = part;
    } else if constexpr (BYTES >= 2) {
        uint16_t part;
        memcpy(&part, from, 2);
        low = part;
    } else if constexpr (BYTES == 1) {
        low = *from;
    }
    constexpr int LOADED = BYTES >= 4 ? 4 : BYTES >= 2 ? 2 : BYTES;
    if constexpr (LOADED < BYTES) low |= load_bytes<BYTES - LOADED>(from + LOADED) << 8 * LOADED;
    return low;
}

// Eights of codes: `WIDTH` bytes each.
template <int WIDTH>
INLINE void close_up_words(const uint8_t* codes, int64_t words, uint8_t* out) {
    for (int64_t i = 0; i < words; i++) {
        uint64_t w;
        memcpy(&w, codes + 8 * i, 8);
        w = close_up(w, WIDTH);
        memcpy(out + i * WIDTH, &w, WIDTH);
    }
}
template <int WIDTH>
INLINE void spread_out_words(const uint8_t* from, int64_t words, uint8_t* codes) {
    for (int64_t i = 0; i < words; i++) {
        uint64_t w = spread_out(load_bytes<WIDTH>(from + i * WIDTH), WIDTH);
        memcpy(codes + 8 * i, &w, 8);
    }
}

// work(width), known when compiling, for what the words above take; whether they do.
template <class Work>
INLINE bool with_short_width(int width, Work work) {
    if (width == 2) return work(Count<2>()), true;
    if (width == 3) return work(Count<3>()), true;
    if (width == 4) return work(Count<4>()), true;
    if (width == 5) return work(Count<5>()), true;
    if (width == 6) return work(Count<6>()), true;
    if (width == 7) return work(Count<7>()), true;
    return false;
}

// Codes, one per T, to `width` bits each, beginning and ending on whole bytes.
template <class T>
void write_bits(const T* codes, int64_t count, int width, uint8_t* out) {
    if (sizeof(T) == 1) {  // what is left has no more than seven codes
        int64_t words = count / 8;
        if (with_short_width(width, [&](auto bits) { close_up_words<bits()>((const uint8_t*)codes, words, out); }))
            codes += 8 * words, out += width * words, count -= 8 * words;
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
    if (sizeof(T) == 1) {
        int64_t words = count / 8;
        if (with_short_width(width, [&](auto bits) { spread_out_words<bits()>(from, words, (uint8_t*)codes); }))
            codes += 8 * words, from += width * words, count -= 8 * words;
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
