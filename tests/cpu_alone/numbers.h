// Numbers of all three elements that a float holds exactly, in memory beside which nothing may be
// touched.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../../csrc/block.h"

using mnv2::Element;
using Numbers = std::vector<double>;

// Kinds of faults that were found. The first of each is printed: a later one may end the process.
inline std::set<std::string>& faults() {
    static std::set<std::string> found;
    return found;
}
inline void fault(const char* kind) {
    if (faults().insert(kind).second) std::printf("wrong: %s\n", kind);
}

inline void stop(const char* why) {
    std::printf("%s\n", why);
    std::exit(2);
}

// A number from its 16 bits: `exponent` bits of exponent, the rest mantissa.
inline double decode(uint16_t bits, int exponent) {
    const int mantissa = 15 - exponent, bias = (1 << (exponent - 1)) - 1;
    const int e = bits >> mantissa & ((1 << exponent) - 1), m = bits & ((1 << mantissa) - 1);
    const double sign = bits & 0x8000 ? -1 : 1;
    if (e == (1 << exponent) - 1) return m ? NAN : sign * INFINITY;
    if (e == 0) return sign * std::ldexp(m, 1 - bias - mantissa);
    return sign * std::ldexp((1 << mantissa) + m, e - bias - mantissa);
}

// The bits of a number that 16 bits hold exactly.
inline uint16_t encode(double value, int exponent) {
    for (uint32_t bits = 0; bits < 0x10000; bits++)
        if (decode(bits, exponent) == value) return bits;
    stop("a number has no 16 bits");
    return 0;
}

inline int exponent_bits(Element element) { return element == Element::half ? 5 : 8; }

inline double read(const void* from, int64_t i, Element element) {
    if (element == Element::single) return static_cast<const float*>(from)[i];
    return decode(static_cast<const uint16_t*>(from)[i], exponent_bits(element));
}

// All NaN of its 16 bits or 32.
inline void fill_with_nan(void* memory, int64_t bytes) { std::memset(memory, 0xff, bytes); }

#if defined(__SANITIZE_ADDRESS__)

// The memory of one case, released with it. Every piece is one of the heap, of exactly its size:
// the sanitizer sees each access beside it. What need not be aligned is so to its elements alone
// where `at_end`.
class Pieces {
 public:
    explicit Pieces(bool at_end) : at_end_(at_end) {}
    Pieces(const Pieces&) = delete;
    ~Pieces() {
        for (void* const piece : pieces_) std::free(piece);
    }

    void* allocate(int64_t bytes, bool aligned, int64_t element_size) {
        const int64_t offset = aligned || !at_end_ ? 0 : element_size;
        void* piece = nullptr;
        if (posix_memalign(&piece, 64, bytes + offset) != 0) stop("no memory");
        pieces_.push_back(piece);
        fill_with_nan(piece, bytes + offset);
        return static_cast<char*>(piece) + offset;
    }
    void make_constant() {}
    void check_margins() const {}

 private:
    bool at_end_;
    std::vector<void*> pieces_;
};

#else

// The memory of one case, released with it. Everything ends before a page that cannot be touched,
// or begins behind one.
class Pieces {
 public:
    explicit Pieces(bool at_end) : at_end_(at_end) {}
    Pieces(const Pieces&) = delete;
    ~Pieces() {
        for (const Region& r : regions_) munmap(r.base, r.bytes);
    }

    void* allocate(int64_t bytes, bool aligned, int64_t) {
        const int64_t page = sysconf(_SC_PAGESIZE);
        const int64_t inside = std::max<int64_t>((bytes + page - 1) / page, 1) * page;
        auto* const base = static_cast<char*>(
            mmap(nullptr, inside + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base == MAP_FAILED || mprotect(base + page, inside, PROT_READ | PROT_WRITE) != 0)
            stop("no memory");
        fill_with_nan(base + page, inside);
        char* at = base + page;
        if (at_end_) at += aligned ? (inside - bytes) / 64 * 64 : inside - bytes;
        regions_.push_back({base, inside + 2 * page, base + page, at, at + bytes});
        return at;
    }
    // The piece that was allocated last is read alone from now on.
    void make_constant() {
        const Region& r = regions_.back();
        mprotect(r.inside, r.bytes - 2 * (r.inside - r.base), PROT_READ);
    }
    // What stands in the pages beside the bytes that were asked for.
    void check_margins() const {
        for (const Region& r : regions_)
            for (const char* p = r.inside; p < r.base + r.bytes - (r.inside - r.base); p++)
                if ((p < r.begin || p >= r.end) && *p != '\xff') fault("margins");
    }

 private:
    struct Region {
        char* base;
        int64_t bytes;
        char *inside, *begin, *end;
    };

    bool at_end_;
    std::vector<Region> regions_;
};

#endif

class Memory {
 public:
    explicit Memory(bool at_end) : pieces_(at_end) {}

    // Filled with NaN. `aligned`: begins at a multiple of 64 bytes.
    void* allocate(int64_t bytes, bool aligned = false, Element element = Element::single) {
        return pieces_.allocate(bytes, aligned, size_of(element));
    }

    // Numbers that are read alone, as `element`.
    const void* constants(const Numbers& numbers, Element element) {
        const auto count = static_cast<int64_t>(numbers.size());
        void* const to = allocate(count * size_of(element), false, element);
        for (int64_t i = 0; i < count; i++)
            if (element == Element::single)
                static_cast<float*>(to)[i] = std::isnan(numbers[i]) ? largest_nan() : numbers[i];
            else
                static_cast<uint16_t*>(to)[i] = encoded(numbers[i], element);
        pieces_.make_constant();
        return to;
    }

    void check_margins() const { pieces_.check_margins(); }

 private:
    // Rounding its bits to 16 as those of a number would make it another one.
    static float largest_nan() {
        const uint32_t bits = 0x7fffffff;
        float nan;
        std::memcpy(&nan, &bits, sizeof nan);
        return nan;
    }

    uint16_t encoded(double value, Element element) {
        // All numbers are a few multiples of 1/32.
        static std::vector<int32_t> known[2];
        auto& table = known[element == Element::half];
        if (std::isnan(value)) return 0x7fff;
        const auto at = static_cast<size_t>(value * 32 + 512);
        if (table.empty()) table.assign(1024, -1);
        if (table[at] < 0) table[at] = encode(value, exponent_bits(element));
        return static_cast<uint16_t>(table[at]);
    }

    Pieces pieces_;
};

// Multiples of 1/32 from -range to range.
inline Numbers random_numbers(std::mt19937& engine, int64_t count, double range) {
    std::uniform_int_distribution<int> steps(static_cast<int>(-32 * range),
                                             static_cast<int>(32 * range));
    Numbers numbers(count);
    for (double& number : numbers) number = steps(engine) / 32.0;
    return numbers;
}
