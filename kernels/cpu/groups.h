// Groups of 16 numbers in vector registers, one row of the operand to a lane: what kernels.cpp does to its tiles, group by group.
//
// The rules are those of kernels/reference.py, bit for bit. That rests on:
//  * -ffp-contract=off and no -ffast-math (build.py): no fused multiply-add, no approximate reciprocal, no reassociation.
//  * Tensor scales are powers of two in [2^-126, 2^120], so dividing by one equals multiplying by its reciprocal, exactly rounded.
//  * |x| / (s * g) of the reference equals (|x| / g) / s here: s has four significant bits, so s * g is exact, and where |x| / g is
//    inexact (below 2^-126) both quotients round to the code 0.
//
// Vectors are those of GCC and clang, 64, 32 or 16 bytes wide as the instruction set has them. Only kernels.cpp includes this file.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int GROUP = 16;  // format.GROUP
constexpr float E2M1_MAX = 6.0f;
constexpr float CEILING = 256.0f;                                // reference.SCALE_CEILING of both rules
constexpr float MS_EDEN_TOP = float(6.0 / (17.0 / 16.0 * 0.93));  // what MS-EDEN maps the group maximum to
constexpr uint32_t INFINITY_BITS = 0x7f800000u;

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

template <class V, class S> inline V load(const S* p) { V v; memcpy(&v, p, sizeof v); return v; }
template <class V, class S> inline void store(S* p, V v) { memcpy(p, &v, sizeof v); }
inline Floats fill(float x) { return x - Floats{}; }
inline Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }
inline Floats one_for_zero(Floats x) { return x == 0.0f ? fill(1.0f) : x; }
inline uint32_t bits(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
inline float from_bits(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }

// ---------------------------------------------------------------- numbers of 16 bits and less

struct BFloat16 { uint16_t raw; };
struct Float16 { uint16_t raw; };

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return from_bits(uint32_t(x.raw) << 16); }
inline float to_float(Float16 x) {
    const uint32_t shifted = uint32_t(x.raw & 0x7fff) << 13, exponent = shifted & 0x0f800000;
    const uint32_t normal = shifted + (exponent == 0x0f800000 ? 0x70000000u : 0x38000000u);  // inf and NaN keep the top exponent
    const float subnormal = from_bits(shifted + 0x38800000u) - from_bits(0x38800000u);
    return from_bits((exponent ? normal : bits(subnormal)) | uint32_t(x.raw & 0x8000) << 16);
}

struct E4M3Table {
    float value[256];
    E4M3Table() {
        for (int code = 0; code < 256; code++) {
            const int exponent = code >> 3 & 15, mantissa = code & 7;
            float v = exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
            if ((code & 127) == 127) v = std::numeric_limits<float>::quiet_NaN();
            value[code] = code & 128 ? -v : v;
        }
    }
};
const E4M3Table E4M3;

// The two halves of a group's 16 codes, eight nibbles each, as numbers times `scale` (and then `factor`: the order matters at overflow).
typedef float Eight __attribute__((vector_size(32)));
typedef int32_t EightInts __attribute__((vector_size(32)));

inline void decode_group(const uint8_t* codes, float scale, float factor, float* out) {
    for (int half = 0; half < 2; half++) {
        const uint8_t* c = codes + 4 * half;
        const int32_t word = int32_t(uint32_t(c[0]) | uint32_t(c[1]) << 8 | uint32_t(c[2]) << 16 | uint32_t(c[3]) << 24);
        const EightInts nibble = (word - EightInts{}) >> EightInts{0, 4, 8, 12, 16, 20, 24, 28};
        // Twice the magnitude: m where the exponent field e is 0, else (2 + m) << (e - 1).
        const EightInts e = nibble >> 1 & 3, normal = (e | e >> 1) & 1;
        const EightInts twice = ((normal << 1 | (nibble & 1)) << e) >> normal;
        const Eight value = (Eight)((EightInts)(__builtin_convertvector(twice, Eight) * 0.5f) | (nibble & 8) << 28);
        store(out + 8 * half, value * scale * factor);
    }
}

// ---------------------------------------------------------------- random numbers (philox.py)

inline void philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t stream, uint32_t word[4]) {
    uint32_t c2 = stream, c3 = 0, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
        c1 = uint32_t(p1);
        c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c3 = uint32_t(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    word[0] = c0; word[1] = c1; word[2] = c2; word[3] = c3;
}

// ---------------------------------------------------------------- scales

// g = A / 256 / top as the power of two at or above it, not below 2^-126; 1 for a zero tensor, NaN where A is not finite.
float tensor_scale(uint32_t amax_bits, float top) {
    if (amax_bits >= INFINITY_BITS) return std::numeric_limits<float>::quiet_NaN();
    const float g = from_bits(amax_bits) / CEILING / top;
    if (g == 0.0f) return 1.0f;
    int exponent;
    if (std::frexp(g, &exponent) == 0.5f) exponent--;
    return std::ldexp(1.0f, exponent < -126 ? -126 : exponent);
}

// A number c >= 0 in E4M3 steps: its exponent, not below -6, and c / step in [0, 16). The E4M3 byte of n steps is (exponent + 6) * 8 + n,
// also where n = 16 carries into the exponent.
inline Ints e4m3_exponent(Floats c) {
    const Ints exponent = ((Ints)c >> 23) - 127;
    return exponent < -6 ? Ints{} - 6 : exponent;
}
inline Floats power_of_two(Ints exponent) { return (Floats)((exponent + 127) << 23); }

// ---------------------------------------------------------------- one group of 16 columns, LANES rows of it at a time

inline Floats sum(Floats x[GROUP]) {
    for (int half = GROUP / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] = x[i] + x[i + half];
    return x[0];
}

inline Floats maximum(const Floats x[GROUP]) {  // of magnitudes; NaN, whose bits are the largest, if one is NaN
    Ints top = (Ints)x[0];
    for (int i = 1; i < GROUP; i++) top = (Ints)x[i] > top ? (Ints)x[i] : top;
    return (Floats)top;
}

// Nearest E2M1 magnitude and its code. Adding 2^23 steps rounds to a multiple of the step, ties to even; adding a few steps more lets
// the low bits of the sum be the code: 0.5 * (0..4), 1 * (2..4) + 2 and 2 * (2..3) + 4.
inline Floats round_e2m1(Floats v, Ints& code) {
    const Floats a = v < E2M1_MAX ? v : fill(E2M1_MAX);
    const Floats shift = a < 2.0f ? fill(0x1.8p22f) : (a < 4.0f ? fill(0x1.8p23f + 2) : fill(0x1.8p24f + 8));
    const Floats shifted = a + shift;
    code = (Ints)shifted & 7;
    return shifted - shift;
}

struct Codes {
    Words half[2];  // nibbles of columns 0..7 and 8..15
    void clear() { half[0] = half[1] = Words{}; }
    void set(int i, Ints nibble) { half[i / 8] |= (Words)nibble << (4 * (i % 8)); }
};

inline void signs_of(const Floats x[GROUP], Codes& codes) {
    codes.clear();
    for (int i = 0; i < GROUP; i++) codes.half[i / 8] |= ((Words)x[i] >> 31) << (4 * (i % 8) + 3);
}

// One candidate of four-over-six: w are magnitudes in units of the tensor scale, c the scale before rounding.
inline Floats candidate(const Floats w[GROUP], Floats c, Codes& codes, Ints& scale_byte) {
    const Ints exponent = e4m3_exponent(c);
    const Floats k = c * power_of_two(3 - exponent);
    const Floats n = (k + 0x1.8p23f) - 0x1.8p23f;  // to nearest, ties to even
    const Floats s = one_for_zero(n * power_of_two(exponent - 3));
    const Ints byte = ((exponent + 6) << 3) + __builtin_convertvector(n, Ints);
    scale_byte = byte == 0 ? Ints{} + 0x38 : byte;  // 0x38 is 1
    Floats squared[GROUP];
    codes.clear();
    for (int i = 0; i < GROUP; i++) {
        Ints code;
        const Floats q = round_e2m1(w[i] / s, code);
        codes.set(i, code);
        const Floats difference = q * s - w[i];
        squared[i] = difference * difference;
    }
    return sum(squared);
}

inline void four_over_six_group(const Floats x[GROUP], float inverse_g, Codes& codes, Ints& scale_byte) {
    Floats w[GROUP];
    for (int i = 0; i < GROUP; i++) w[i] = magnitude(x[i]);
    const Floats amax = maximum(w), base = amax / E2M1_MAX * inverse_g;
    for (int i = 0; i < GROUP; i++) w[i] = w[i] * inverse_g;
    Codes six, four;
    Ints byte6, byte4;
    const Floats error6 = candidate(w, base, six, byte6), error4 = candidate(w, base * 1.5f, four, byte4);
    const Ints choice = error4 < error6, nonzero = amax > 0.0f;
    signs_of(x, codes);
    for (int h = 0; h < 2; h++) codes.half[h] = (codes.half[h] | (choice ? four.half[h] : six.half[h])) & (Words)nonzero;
    scale_byte = choice ? byte4 : byte6;
}

// Codes of MS-EDEN and t, the scale that undoes their shrinkage.
inline Floats ms_eden_group(const Floats y[GROUP], Codes& codes) {
    Floats v[GROUP], vv[GROUP], vc[GROUP];
    for (int i = 0; i < GROUP; i++) v[i] = magnitude(y[i]);
    const Floats amax = maximum(v), m = amax / MS_EDEN_TOP, divisor = one_for_zero(m);
    signs_of(y, codes);
    for (int i = 0; i < GROUP; i++) {
        v[i] = v[i] / divisor;
        Ints code;
        const Floats c = round_e2m1(v[i], code);
        codes.set(i, code);
        vv[i] = v[i] * v[i];
        vc[i] = v[i] * c;
    }
    const Floats numerator = sum(vv), denominator = sum(vc);
    for (int h = 0; h < 2; h++) codes.half[h] &= (Words)(amax > 0.0f);
    return m * (denominator == 0.0f ? fill(1.0f) : numerator / one_for_zero(denominator));
}

}  // namespace
