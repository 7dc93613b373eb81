// The quantization rules of kernels/reference.py on a CPU, bit for bit, over raw pointers and arbitrary strides.
//
// All work is done on tiles of 16 rows of the operand by 128 of its columns, held as tile[column][row] in the L1 cache: neighbouring
// lanes of a vector register hold neighbouring rows, so the butterflies of the rotation, the maxima and the sums of a group are plain
// element-wise vector instructions, in the order that the reference fixes. Only loading knows of orientations, dtypes and padding.
//
// Four-over-six reads an element twice (the maximum of the tensor first) and divides twice; MS-EDEN reads once and divides once, and
// rounds its scales, one float a group, in a second pass, when their maximum is known.

#include "groups.h"

namespace {

constexpr int ROTATION = 128;  // format.ROTATION
constexpr int ROWS = 16;       // rows of a tile

typedef float Tile[ROTATION][ROWS] __attribute__((aligned(64)));

// ---------------------------------------------------------------- tiles

constexpr uint32_t STREAM_SIGNS = 0;  // philox.STREAM_SIGNS

struct Signs {
    float of[ROTATION];
    explicit Signs(uint64_t seed) {
        uint32_t word[4];
        philox(seed, 0, 0, STREAM_SIGNS, word);
        for (int j = 0; j < ROTATION; j++) of[j] = word[j / 32] >> (j % 32) & 1 ? -1.0f : 1.0f;
    }
};

// H (signs * x) along the columns of a tile, butterflies from the distance 1 upwards; two passes of four and three steps in registers.
void rotate(Tile tile, const Signs& signs) {
    for (int lane = 0; lane < ROWS; lane += LANES) {
        Floats y[GROUP];
        for (int block = 0; block < ROTATION; block += GROUP) {
            for (int i = 0; i < GROUP; i++) y[i] = load<Floats>(&tile[block + i][lane]) * signs.of[block + i];
#pragma GCC unroll 4
            for (int distance = 1; distance < GROUP; distance *= 2)
#pragma GCC unroll 16
                for (int i = 0; i < GROUP; i++)
                    if (!(i & distance)) { const Floats a = y[i], b = y[i + distance]; y[i] = a + b; y[i + distance] = a - b; }
            for (int i = 0; i < GROUP; i++) store(&tile[block + i][lane], y[i]);
        }
        for (int first = 0; first < GROUP; first++) {
            for (int i = 0; i < 8; i++) y[i] = load<Floats>(&tile[first + GROUP * i][lane]);
#pragma GCC unroll 3
            for (int distance = 1; distance < 8; distance *= 2)
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++)
                    if (!(i & distance)) { const Floats a = y[i], b = y[i + distance]; y[i] = a + b; y[i + distance] = a - b; }
            for (int i = 0; i < 8; i++) store(&tile[first + GROUP * i][lane], y[i] + 0.0f);  // -0 becomes +0, as in the reference
        }
    }
}

// The matrices that tiles are loaded from. `load` fills columns [column, column + width) of rows [row, row + 16), zeros outside.
// `rows_first` says which neighbours share cache lines.
template <class T> struct Strided {
    const T* data;
    int64_t rows, columns, row_stride, column_stride;
    bool rows_first() const { return row_stride < column_stride; }
    void load(Tile tile, int64_t row, int64_t column, int width) const {
        const int height = int(rows - row < ROWS ? rows - row : ROWS);
        if (columns - column < width) {
            memset(tile[columns - column], 0, sizeof(tile[0]) * size_t(width - (columns - column)));
            width = int(columns - column);
        }
        const T* from = data + row * row_stride + column * column_stride;
        if (height == ROWS && row_stride == 1) {
            for (int k = 0; k < width; k++)
                for (int r = 0; r < ROWS; r++) tile[k][r] = to_float(from[k * column_stride + r]);
            return;
        }
        if (height < ROWS) memset(tile, 0, sizeof(tile[0]) * size_t(width));  // never stored, but let no stale NaN or subnormal slow us
        if (column_stride == 1) {
            for (int r = 0; r < height; r++)
                for (int k = 0; k < width; k++) tile[k][r] = to_float(from[r * row_stride + k]);
            return;
        }
        for (int k = 0; k < width; k++)
            for (int r = 0; r < height; r++) tile[k][r] = to_float(from[r * row_stride + k * column_stride]);
    }
};

// The transpose of a packed matrix [M, groups * 16]: 16 rows of the operand are one group of each packed row.
struct PackedTransposed {
    const uint8_t *codes, *scales;
    int64_t rows, columns, groups;  // of the operand: columns = M
    bool rows_first() const { return true; }
    void load(Tile tile, int64_t row, int64_t column, int width) const {
        if (columns - column < width) {
            memset(tile[columns - column], 0, sizeof(tile[0]) * size_t(width - (columns - column)));
            width = int(columns - column);
        }
        for (int k = 0; k < width; k++) {
            const int64_t at = (column + k) * groups + row / GROUP;
            decode_group(codes + 8 * at, E4M3.value[scales[at]], 1.0f, tile[k]);
        }
    }
};

inline void store_codes(const Codes& codes, uint8_t* to, int64_t row_bytes, int rows) {
    uint32_t half[2][LANES];
    for (int h = 0; h < 2; h++) store(half[h], codes.half[h]);
    for (int r = 0; r < rows && r < LANES; r++) {
        uint64_t word = half[0][r] | uint64_t(half[1][r]) << 32;
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        word = __builtin_bswap64(word);
#endif
        memcpy(to + r * row_bytes, &word, 8);
    }
}

// Calls body(row, column) for the corner of every tile, tiles that share cache lines one after the other.
template <class Body> void for_tiles(int64_t rows, int64_t columns, bool rows_first, int threads, Body body) {
    const int64_t down = (rows + ROWS - 1) / ROWS, across = (columns + ROTATION - 1) / ROTATION;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < down * across; i++)
        body((rows_first ? i % down : i / across) * ROWS, (rows_first ? i / down : i % across) * ROTATION);
}

template <class T> uint32_t amax_bits(const Strided<T>& x, int threads) {
    const bool swap = x.rows_first();  // the inner loop runs along the smaller stride
    const int64_t outer = swap ? x.columns : x.rows, inner = swap ? x.rows : x.columns;
    const int64_t outer_stride = swap ? x.column_stride : x.row_stride, inner_stride = swap ? x.row_stride : x.column_stride;
    uint32_t top = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : top) if (threads > 1)
    for (int64_t i = 0; i < outer; i++) {
        const T* line = x.data + i * outer_stride;
        uint32_t most = 0;
        for (int64_t j = 0; j < inner; j++) {
            const uint32_t b = bits(to_float(inner_stride == 1 ? line[j] : line[j * inner_stride])) & 0x7fffffff;
            most = b > most ? b : most;
        }
        top = most > top ? most : top;
    }
    return top;
}

// ---------------------------------------------------------------- the rules

template <class T>
void four_over_six(const Strided<T>& x, uint8_t* codes, uint8_t* scales, float* g, int threads) {
    const int64_t groups = (x.columns + GROUP - 1) / GROUP;
    *g = tensor_scale(amax_bits(x, threads), E2M1_MAX);
    if (std::isnan(*g)) {
        memset(codes, 0, size_t(x.rows * groups * 8));
        memset(scales, 0, size_t(x.rows * groups));
        return;
    }
    const float inverse_g = 1.0f / *g;
    for_tiles(x.rows, x.columns, x.rows_first(), threads, [&](int64_t row, int64_t column) {
        Tile tile;
        const int64_t first = column / GROUP;
        const int here = int(groups - first < 8 ? groups - first : 8), height = int(x.rows - row < ROWS ? x.rows - row : ROWS);
        x.load(tile, row, column, here * GROUP);
        for (int group = 0; group < here; group++)
            for (int lane = 0; lane < height; lane += LANES) {
                Floats v[GROUP];
                for (int i = 0; i < GROUP; i++) v[i] = load<Floats>(&tile[group * GROUP + i][lane]);
                Codes packed;
                Ints byte;
                four_over_six_group(v, inverse_g, packed, byte);
                const int64_t at = (row + lane) * groups + first + group;
                store_codes(packed, codes + 8 * at, 8 * groups, height - lane);
                for (int r = 0; r < LANES && lane + r < height; r++) scales[at + r * groups] = uint8_t(byte[r]);
            }
    });
}

template <class Matrix>
void ms_eden(const Matrix& x, uint64_t seed, uint32_t stream, uint8_t* codes, uint8_t* scales, float* g, float* t, int threads) {
    const int64_t groups = (x.columns + ROTATION - 1) / ROTATION * (ROTATION / GROUP);
    const Signs signs(seed);
    for_tiles(x.rows, x.columns, x.rows_first(), threads, [&](int64_t row, int64_t column) {
        Tile tile;
        const int64_t first = column / GROUP;
        const int height = int(x.rows - row < ROWS ? x.rows - row : ROWS);
        x.load(tile, row, column, ROTATION);
        rotate(tile, signs);
        for (int group = 0; group < ROTATION / GROUP; group++)
            for (int lane = 0; lane < height; lane += LANES) {
                Floats y[GROUP];
                for (int i = 0; i < GROUP; i++) y[i] = load<Floats>(&tile[group * GROUP + i][lane]);
                Codes packed;
                const Floats scale = ms_eden_group(y, packed);
                const int64_t at = (row + lane) * groups + first + group;
                store_codes(packed, codes + 8 * at, 8 * groups, height - lane);
                for (int r = 0; r < LANES && lane + r < height; r++) t[at + r * groups] = scale[r];
            }
    });
    const Strided<float> all{t, x.rows, groups, groups, 1};
    *g = tensor_scale(amax_bits(all, threads), 1.0f);
    if (std::isnan(*g)) {
        memset(codes, 0, size_t(x.rows * groups * 8));
        memset(scales, 0, size_t(x.rows * groups));
        return;
    }
    const float inverse_g = 1.0f / *g;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < x.rows; row++)
        for (int64_t call = 0; call < groups / 2; call++) {  // its words are for groups k and k + 4 of eight, at rows r and r + 8
            uint32_t word[4];
            philox(seed, uint32_t(call), uint32_t(row & ~int64_t(8)), stream, word);
            for (int64_t half = 0; half < 2; half++) {
                const int64_t group = call / 4 * 8 + call % 4 + 4 * half;
                const float c = t[row * groups + group] * inverse_g;  // at most 256
                int32_t exponent = int32_t(bits(c) >> 23) - 127;
                exponent = exponent < -6 ? -6 : exponent;
                const float k = c * from_bits(uint32_t(3 - exponent + 127) << 23);
                const float u = float(int32_t(word[row / 8 % 2 * 2 + half] >> 8)) * 0x1p-24f;
                const int32_t n = int32_t(k);
                scales[row * groups + group] = uint8_t((exponent + 6) * 8 + n + (u < k - float(n)));
            }
        }
}

enum { FLOAT32, BFLOAT16, FLOAT16 };  // as in __init__.py

template <class Body>
void with_dtype(int dtype, const void* x, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, Body body) {
    if (dtype == FLOAT32) body(Strided<float>{static_cast<const float*>(x), rows, columns, row_stride, column_stride});
    if (dtype == BFLOAT16) body(Strided<BFloat16>{static_cast<const BFloat16*>(x), rows, columns, row_stride, column_stride});
    if (dtype == FLOAT16) body(Strided<Float16>{static_cast<const Float16*>(x), rows, columns, row_stride, column_stride});
}

}  // namespace

#include "sums.h"

// ---------------------------------------------------------------- what __init__.py and sums.py call; all dimensions at least 1

extern "C" {

// x [rows, columns] -> codes [rows, ceil(columns/16)*8], scales [rows, ceil(columns/16)], g [].
void quartet_four_over_six(const void* x, int dtype, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                           uint8_t* codes, uint8_t* scales, float* g, int threads) {
    with_dtype(dtype, x, rows, columns, row_stride, column_stride, [&](auto m) { four_over_six(m, codes, scales, g, threads); });
}

// x [rows, columns] -> rotated along its columns and rounded, padded to multiples of 128. t is room for one float a group.
void quartet_ms_eden(const void* x, int dtype, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, uint64_t seed,
                     uint32_t stream, uint8_t* codes, uint8_t* scales, float* g, float* t, int threads) {
    with_dtype(dtype, x, rows, columns, row_stride, column_stride,
               [&](auto m) { ms_eden(m, seed, stream, codes, scales, g, t, threads); });
}

// Packed [packed_rows, groups * 16], of which `columns` columns are real -> its transpose, rotated and rounded; g without the old one.
void quartet_requantize(const uint8_t* packed, const uint8_t* packed_scales, int64_t packed_rows, int64_t groups, int64_t columns,
                        uint64_t seed, uint32_t stream, uint8_t* codes, uint8_t* scales, float* g, float* t, int threads) {
    ms_eden(PackedTransposed{packed, packed_scales, columns, packed_rows, groups}, seed, stream, codes, scales, g, t, threads);
}

// out[i] = code * scale * factor for `groups` groups of 16 in a row.
void quartet_dequantize(const uint8_t* codes, const uint8_t* scales, int64_t groups, float factor, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < groups; i++) decode_group(codes + 8 * i, E4M3.value[scales[i]], factor, out + GROUP * i);
}

// The largest magnitude; NaN if there is one.
void quartet_largest(const void* x, int dtype, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, float* out,
                     int threads) {
    with_dtype(dtype, x, rows, columns, row_stride, column_stride, [&](auto m) { *out = from_bits(amax_bits(m, threads)); });
}

// Some rows of x [.., columns] and their codes [.., groups * 16], rotated or not: eight sums for each of them.
void quartet_fresh_sums(const void* x, int dtype, const int64_t* rows, int64_t count, int64_t columns, int64_t row_stride,
                        int64_t column_stride, const uint8_t* codes, const uint8_t* scales, int64_t groups, double g, int rotated,
                        uint64_t seed, double* out, int threads) {
    const Signs signs(seed);
    with_dtype(dtype, x, 0, columns, row_stride, column_stride, [&](auto m) {
        const auto load = [&](int64_t row, int64_t column, int width, double* to) {
            const auto* from = m.data + row * row_stride + column * column_stride;
            if (column_stride == 1)
                for (int k = 0; k < width; k++) to[k] = double(to_float(from[k]));
            else
                for (int k = 0; k < width; k++) to[k] = double(to_float(from[k * column_stride]));
        };
        operand_sums(load, rows, count, columns, codes, scales, groups, g, rotated ? &signs : nullptr, out, threads);
    });
}

// Some columns of a packed [length, source_groups * 16] and what they became as rows, rotated: eight sums for each of them.
void quartet_saved_sums(const uint8_t* source, const uint8_t* source_scales, int64_t source_groups, double source_g, int64_t length,
                        const int64_t* rows, int64_t count, const uint8_t* codes, const uint8_t* scales, int64_t groups, double g,
                        uint64_t seed, double* out, int threads) {
    static const double VALUES[] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6};
    const Signs signs(seed);
    const auto load = [&](int64_t row, int64_t column, int width, double* to) {
        for (int k = 0; k < width; k++) {
            const int64_t at = (column + k) * source_groups;
            const int code = source[8 * at + row / 2] >> (row % 2 * 4) & 15;
            to[k] = VALUES[code] * double(E4M3.value[source_scales[at + row / GROUP]]) * source_g;
        }
    };
    operand_sums(load, rows, count, length, codes, scales, groups, g, &signs, out, threads);
}

// Some rows of a product, and the same rows, contiguous, of another one: eight sums for each of them.
void quartet_product_sums(const void* result, int dtype, int64_t columns, int64_t row_stride, int64_t column_stride, const void* exact,
                          int exact_dtype, const int64_t* rows, int64_t count, double* out, int threads) {
    with_dtype(dtype, result, 0, columns, row_stride, column_stride, [&](auto m) {
        with_dtype(exact_dtype, exact, 0, columns, columns, 1, [&](auto x) { product_sums(m, x.data, rows, count, out, threads); });
    });
}
}
