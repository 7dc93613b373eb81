// Sums over rows of what was quantized and of what became of them, in double: kernels/measure.py, row by row.
//
// Rotated in double too, so that exact zeros of exact sums are zeros. Only kernels.cpp includes this file.

namespace {

inline double larger(double a, double b) { return (a > b) | (a != a) ? a : b; }  // NaN if one of them is

// The eight sums of a row: <x, x>, <q, q>, <q, x>, |q - x|^2, numbers that are not zero, saturated, underflowed, largest magnitude.
// Each in 16 parts, for the members of groups, so that additions are those of vectors.
struct RowSums {
    double parts[8][GROUP] = {};
    void add(const double* x, const double* q, int width) {
        for (int k = 0; k < width; k++) {
            const double d = q[k] - x[k];
            parts[0][k] += x[k] * x[k];
            parts[1][k] += q[k] * q[k];
            parts[2][k] += q[k] * x[k];
            parts[3][k] += d * d;
        }
    }
    void count(const double* x, const double* q, double most) {
        for (int k = 0; k < GROUP; k++) {
            parts[4][k] += x[k] != 0 ? 1 : 0;
            parts[5][k] += (std::fabs(x[k]) > most) & (q[k] != 0) ? 1 : 0;
            parts[6][k] += (x[k] != 0) & (q[k] == 0) ? 1 : 0;
        }
    }
    void see(const double* x, int width) {
        for (int k = 0; k < width; k++) parts[7][k] = larger(std::fabs(x[k]), parts[7][k]);
    }
    void store(double* out) const {
        for (int i = 0; i < 8; i++) {
            out[i] = parts[i][0];
            for (int k = 1; k < GROUP; k++)
                out[i] = i < 7 ? out[i] + parts[i][k] : larger(parts[i][k], out[i]);
        }
    }
};

inline void rotate(double* x, const Signs& signs) {
    for (int i = 0; i < ROTATION; i++) x[i] *= double(signs.of[i]);
    for (int distance = 1; distance < ROTATION; distance *= 2)
        for (int first = 0; first < ROTATION; first += 2 * distance)
            for (int i = first; i < first + distance; i++) {
                const double a = x[i], b = x[i + distance];
                x[i] = a + b;
                x[i + distance] = a - b;
            }
}

// load(row, column, width, to): x; width is 128, or less at the end of a row, where zeros follow. signs: null without rotation.
template <class Load>
void operand_sums(Load load, const int64_t* rows, int64_t count, int64_t columns, const uint8_t* codes, const uint8_t* scales, int64_t groups,
                  double g, const Signs* signs, double* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < count; i++) {
        RowSums sums;
        for (int64_t column = 0; column < groups * GROUP; column += ROTATION) {
            double x[ROTATION] = {};
            const int64_t left = columns - column;
            if (left > 0) load(rows[i], column, int(left < ROTATION ? left : ROTATION), x);
            for (int k = 0; k < ROTATION; k += GROUP) sums.see(x + k, GROUP);
            if (signs) rotate(x, *signs);
            for (int64_t group = column / GROUP; group < groups && group < column / GROUP + ROTATION / GROUP; group++) {
                const int64_t at = rows[i] * groups + group;
                const double* own = x + (group * GROUP - column);
                const double scale = double(E4M3.value[scales[at]]), most = scale * g * E2M1_MAX;
                float values[GROUP];
                double q[GROUP];
                decode_group(codes + 8 * at, 1.0f, 1.0f, values);
                for (int k = 0; k < GROUP; k++) q[k] = double(values[k]) * (scale * g);
                sums.add(own, q, GROUP);
                sums.count(own, q, most);
            }
        }
        sums.store(out + 8 * i);
    }
}

template <class Result, class Exact>
void product_sums(const Strided<Result>& result, const Exact* exact, const int64_t* rows, int64_t count, double* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < count; i++) {
        RowSums sums;
        for (int64_t column = 0; column < result.columns; column += GROUP) {
            const int width = int(result.columns - column < GROUP ? result.columns - column : GROUP);
            double x[GROUP], q[GROUP];
            for (int k = 0; k < width; k++) {
                x[k] = double(to_float(exact[i * result.columns + column + k]));
                q[k] = double(to_float(result.data[rows[i] * result.row_stride + (column + k) * result.column_stride]));
            }
            sums.add(x, q, width);
            sums.see(x, width);
        }
        sums.store(out + 8 * i);
    }
}

}  // namespace
