// Sums over rows of what was quantized and of what became of them, in double: kernels/measure.py, row by row.
//
// Rotated in double too, so that exact zeros of exact sums are zeros. Only kernels.cpp includes this file.

namespace {

// The eight sums of a row: <x, x>, <q, q>, <q, x>, |q - x|^2, numbers that are not zero, saturated, underflowed, largest magnitude.
struct RowSums {
    double xx = 0, qq = 0, qx = 0, ee = 0, numbers = 0, saturated = 0, underflowed = 0, largest = 0;
    void add(double x, double q) {
        xx += x * x;
        qq += q * q;
        qx += q * x;
        ee += (q - x) * (q - x);
    }
    void see(double x) { largest = std::fabs(x) > largest || std::isnan(x) ? std::fabs(x) : largest; }
    void store(double* out) const { memcpy(out, this, sizeof *this); }
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
            for (int k = 0; k < ROTATION; k++) sums.see(x[k]);
            if (signs) rotate(x, *signs);
            for (int64_t group = column / GROUP; group < groups && group < column / GROUP + ROTATION / GROUP; group++) {
                const int64_t at = rows[i] * groups + group;
                const double* own = x + (group * GROUP - column);
                const double scale = double(E4M3.value[scales[at]]), most = scale * g * E2M1_MAX;
                float values[GROUP];
                decode_group(codes + 8 * at, 1.0f, 1.0f, values);
                for (int k = 0; k < GROUP; k++) {
                    const double q = double(values[k]) * (scale * g);
                    sums.add(own[k], q);
                    sums.numbers += own[k] != 0;
                    sums.saturated += std::fabs(own[k]) > most && q != 0;
                    sums.underflowed += own[k] != 0 && q == 0;
                }
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
        for (int64_t k = 0; k < result.columns; k++) {
            const double x = double(to_float(exact[i * result.columns + k]));
            sums.add(x, double(to_float(result.data[rows[i] * result.row_stride + k * result.column_stride])));
            sums.see(x);
        }
        sums.store(out + 8 * i);
    }
}

}  // namespace
