// Vectors, products and the few functions that the scan is made of.
//
// Everything is in float32. Rows that vectors run along are padded with zeros to multiples of LANES
// floats, on whatever width the processor has.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

using Size = std::int64_t;

#if defined(__AVX512F__)
constexpr int WIDTH = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int WIDTH = 8, REGISTERS = 16;
#else
constexpr int WIDTH = 4, REGISTERS = 32;
#endif
constexpr Size LANES = 16;

// Loaded and stored at any float's address.
typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef std::int32_t Integers __attribute__((vector_size(4 * WIDTH)));

inline Size padded(Size n) { return (n + LANES - 1) / LANES * LANES; }
inline Vector& at(float* p) { return *(Vector*)p; }
inline const Vector& at(const float* p) { return *(const Vector*)p; }

// A matrix by its first element and the distances between rows and between columns.
struct Matrix {
  float* p;
  Size row, column = 1;
  Matrix T() const { return {p, column, row}; }
  Matrix from(Size i, Size j) const { return {p + i * row + j * column, row, column}; }
};

// R rows and V vectors of columns of C. Rows past the m there are repeat the last, unstored.
template <int R, int V>
static void tile(Size m, Size k, Matrix C, Matrix A, Matrix B, float alpha, bool add) {
  Vector sum[R][V] = {};
  const float* row[R];
  for (int r = 0; r < R; ++r) row[r] = A.p + std::min<Size>(r, m - 1) * A.row;
  for (Size p = 0; p < k; ++p) {
    Vector b[V];
    for (int v = 0; v < V; ++v) b[v] = at(B.p + p * B.row + v * WIDTH);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += row[r][p * A.column] * b[v];
  }
  for (int r = 0; r < R && r < m; ++r)
    for (int v = 0; v < V; ++v) {
      Vector& c = at(C.p + r * C.row + v * WIDTH);
      c = add ? c + alpha * sum[r][v] : alpha * sum[r][v];
    }
}

// From column j on, as far as V vectors go; returns how far.
template <int R, int V>
static Size tiles(Size j, Size m, Size n, Size k, Matrix C, Matrix A, Matrix B, float alpha,
                  bool add) {
  for (; j + V * WIDTH <= n; j += V * WIDTH)
    for (Size i = 0; i < m; i += R)
      tile<R, V>(m - i, k, C.from(i, j), A.from(i, 0), B.from(0, j), alpha, add);
  return j;
}

inline void product(Size m, Size n, Size k, Matrix C, Matrix A, Matrix B, float alpha, bool add) {
  Size j = 0;
  if (REGISTERS == 32) j = tiles<6, 4>(j, m, n, k, C, A, B, alpha, add);
  j = tiles<REGISTERS == 32 ? 8 : 4, 2>(j, m, n, k, C, A, B, alpha, add);
  tiles<8, 1>(j, m, n, k, C, A, B, alpha, add);
}

// C[m, n] = alpha A[m, k] B[k, n], and C += .. . Columns of B and C are neighbours, n of them, a
// multiple of LANES. A's elements are taken one by one, so A may be a transpose.
inline void set(Size m, Size n, Size k, Matrix C, Matrix A, Matrix B, float alpha = 1) {
  product(m, n, k, C, A, B, alpha, false);
}
inline void add(Size m, Size n, Size k, Matrix C, Matrix A, Matrix B, float alpha = 1) {
  product(m, n, k, C, A, B, alpha, true);
}

// b[n, m] = a[m, n]^T.
inline void transpose(Size m, Size n, const float* a, Size lda, float* b, Size ldb) {
  for (Size i = 0; i < m; ++i)
    for (Size j = 0; j < n; ++j) b[j * ldb + i] = a[i * lda + j];
}

inline float total(Vector x) {
  float sum = 0;
  for (int i = 0; i < WIDTH; ++i) sum += x[i];
  return sum;
}

inline float sum(const float* x, Size n) {
  Vector s = {};
  for (Size i = 0; i < n; i += WIDTH) s += at(x + i);
  return total(s);
}

inline float dot(const float* x, const float* y, Size n) {
  Vector s = {};
  for (Size i = 0; i < n; i += WIDTH) s += at(x + i) * at(y + i);
  return total(s);
}

// y += a x
inline void axpy(Size n, float a, const float* x, float* y) {
  for (Size i = 0; i < n; ++i) y[i] += a * x[i];
}

// e^x to an ulp or two: 2^n e^r with |r| <= ln(2) / 2, e^r by its Taylor series to r^7.
inline Vector exponential(Vector x) {
  x = x > 87.0f ? Vector{} + 87.0f : x;
  x = x < -87.0f ? Vector{} - 87.0f : x;
  Vector half = x < 0 ? Vector{} - 0.5f : Vector{} + 0.5f;
  Integers whole = __builtin_convertvector(x * 1.44269504f + half, Integers);
  Vector n = __builtin_convertvector(whole, Vector);
  Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln(2) in two parts
  Vector p = 1 / 5040.0f + Vector{};
  for (float c : {1 / 720.0f, 1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  return p * (Vector)((whole + 127) << 23);
}

// tanh-GELU, x g with g = sigmoid(2c (x + a x^3)), and its first two derivatives; see ../gelu.py.
struct Gelu {
  Vector value, first, second;
};

inline Gelu gelu(Vector x) {
  constexpr float c2 = 1.59576912f, cubic = c2 * 0.044715f;
  Vector xx = x * x, g = 1 / (1 + exponential(-x * (c2 + cubic * xx)));
  Vector p = c2 + 3 * cubic * xx, value = x * g, rest = 1 - g;
  return {value, g + rest * value * p, g * rest * (p * (4 + (1 - 2 * g) * x * p) - 2 * c2)};
}
