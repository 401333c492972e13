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

// A matrix by its first element and the distances between rows and between columns; where columns
// are vectorised over they must be neighbours.
struct Matrix {
  const float* p;
  Size row, column = 1;
  Matrix T() const { return {p, column, row}; }
};

// C (+)= alpha A B for R rows and V vectors of columns of C; rows past the m there are repeat the
// last and are not stored.
template <int R, int V>
static void tile(Size m, Size k, Matrix A, Matrix B, float alpha, float* C, Size ldc, bool add) {
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
      Vector& c = at(C + r * ldc + v * WIDTH);
      c = add ? c + alpha * sum[r][v] : alpha * sum[r][v];
    }
}

template <int R, int V>
static Size columns(Size j, Size m, Size n, Size k, Matrix A, Matrix B, float alpha, float* C,
                    Size ldc, bool add) {
  for (; j + V * WIDTH <= n; j += V * WIDTH)
    for (Size i = 0; i < m; i += R)
      tile<R, V>(m - i, k, {A.p + i * A.row, A.row, A.column}, {B.p + j, B.row}, alpha,
                 C + i * ldc + j, ldc, add);
  return j;
}

// C[m, n] = alpha A[m, k] B[k, n], or += with `add`; n is a multiple of LANES. What a register tile
// needs of A is broadcast element by element, so A may be a transpose.
inline void product(Size m, Size n, Size k, Matrix A, Matrix B, float alpha, float* C, Size ldc,
                    bool add) {
  Size j = 0;
  if (REGISTERS == 32) j = columns<6, 4>(j, m, n, k, A, B, alpha, C, ldc, add);
  j = columns<REGISTERS == 32 ? 8 : 4, 2>(j, m, n, k, A, B, alpha, C, ldc, add);
  columns<8, 1>(j, m, n, k, A, B, alpha, C, ldc, add);
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
  Vector n = x * 1.44269504f;
  n = __builtin_convertvector(__builtin_convertvector(n + (n < 0 ? Vector{} - 0.5f : Vector{} + 0.5f),
                                                      Integers),
                              Vector);
  Vector r = x - n * 0.693359375f + n * 2.12194440e-4f, p = 1 / 5040.0f + Vector{};
  for (float c : {1 / 720.0f, 1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  Integers exponent = __builtin_convertvector(n, Integers) + 127;
  return p * (Vector)(exponent << 23);
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
