// TTT-Linear and TTT-MLP on a CPU (arXiv 2407.04620, section 2). A thread takes one head after
// another through the whole sequence, so that a head's state and tokens stay in a core's cache.

#include "backward.h"

extern "C" {
Size kept_size(const Arguments* s) { return Sizes(*s).kept(); }

// Of all A heads, as threads get free.
void forward(const Arguments* s, Size A, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (Size a = 0; a < A; ++a) Forward(*s).forward(a);
}
void backward(const Arguments* s, Size A, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (Size a = 0; a < A; ++a) Backward(*s).backward(a);
}
}
