// Sums over rows of what was quantized and of what became of them, in double: kernels/measure.py, row by row.
//
// Rotated in double too, so that exact zeros of exact sums are zeros. Only kernels.cpp includes this file.

namespace {

constexpr int DOUBLES = LANES / 2;  // in a vector
typedef double Doubles __attribute__((vector_size(8 * DOUBLES)));
typedef int64_t Mask __attribute__((vector_size(8 * DOUBLES)));

inline Doubles magnitude(Doubles x) { return (Doubles)((Mask)x & 0x7fffffffffffffff); }

// The eight sums of a row: <x, x>, <q, q>, <q, x>, |q - x|^2, numbers that are not zero, saturated, underflowed, largest magnitude.
struct RowSums {
    Doubles xx{}, qq{}, qx{}, ee{}, largest{};
    Mask numbers{}, saturated{}, underflowed{};
    void add(const double* x_group, const double* q_group) {
        for (int k = 0; k < GROUP; k += DOUBLES) {
            const Doubles x = load<Doubles>(x_group + k), q = load<Doubles>(q_group + k);
            xx += x * x;
            qq += q * q;
            qx += q * x;
            ee += (q - x) * (q - x);
        }
    }
    void count(const double* x_group, const double* q_group, double most) {
        for (int k = 0; k < GROUP; k += DOUBLES) {
            const Doubles x = load<Doubles>(x_group + k), q = load<Doubles>(q_group + k);
            numbers -= x != 0.0;
            saturated -= (magnitude(x) > most) & (q != 0.0);
            underflowed -= (x != 0.0) & (q == 0.0);
        }
    }
    void see(const double* group) {
        for (int k = 0; k < GROUP; k += DOUBLES) {
            const Doubles x = magnitude(load<Doubles>(group + k));
            largest = (x > largest) | (x != x) ? x : largest;  // a NaN stays
        }
    }
    void store(double* out) const {
        for (int i = 0; i < 8; i++) out[i] = 0;
        for (int k = 0; k < DOUBLES; k++) {
            const double parts[] = {xx[k], qq[k], qx[k], ee[k], double(numbers[k]), double(saturated[k]), double(underflowed[k])};
            for (int i = 0; i < 7; i++) out[i] += parts[i];
            out[7] = (largest[k] > out[7]) | (largest[k] != largest[k]) ? largest[k] : out[7];
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

// fill(row, column, width, to): x; width is 128, or less at the end of a row, where zeros follow. signs: null without rotation.
template <class Load>
void operand_sums(Load fill, const int64_t* rows, int64_t count, int64_t columns, const uint8_t* codes, const uint8_t* scales, int64_t groups,
                  double g, const Signs* signs, double* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < count; i++) {
        RowSums sums;
        for (int64_t column = 0; column < groups * GROUP; column += ROTATION) {
            double x[ROTATION] = {};
            const int64_t left = columns - column;
            if (left > 0) fill(rows[i], column, int(left < ROTATION ? left : ROTATION), x);
            for (int k = 0; k < ROTATION; k += GROUP) sums.see(x + k);
            if (signs) rotate(x, *signs);
            for (int64_t group = column / GROUP; group < groups && group < column / GROUP + ROTATION / GROUP; group++) {
                const int64_t at = rows[i] * groups + group;
                const double* own = x + (group * GROUP - column);
                const double scale = double(E4M3.value[scales[at]]), most = scale * g * E2M1_MAX;
                float values[GROUP];
                decode_group(codes + 8 * at, 1.0f, 1.0f, values);
                double q[GROUP];
                for (int k = 0; k < GROUP; k++) q[k] = double(values[k]) * (scale * g);
                sums.add(own, q);
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
            double x[GROUP] = {}, q[GROUP] = {};
            for (int k = 0; k < width; k++) {
                x[k] = double(to_float(exact[i * result.columns + column + k]));
                q[k] = double(to_float(result.data[rows[i] * result.row_stride + (column + k) * result.column_stride]));
            }
            sums.add(x, q);
            sums.see(x);
        }
        sums.store(out + 8 * i);
    }
}

}  // namespace
