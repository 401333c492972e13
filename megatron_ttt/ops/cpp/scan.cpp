// TTT-Linear and TTT-MLP on a CPU (arXiv 2407.04620, section 2). A call takes one head through the
// whole sequence, so that its state and tokens stay in a core's cache; scan.py calls from threads.

#include "backward.h"

extern "C" {
Size kept_size(const Arguments* s) { return Sizes(*s).kept(); }
Size kept_state_size(const Arguments* s) { return Sizes(*s).kept_state(); }
void forward(const Arguments* s, Size a) { Forward(*s).forward(a); }
void backward(const Arguments* s, Size a) { Backward(*s).backward(a); }
}
