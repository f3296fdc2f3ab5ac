// One wheel for every x86-64: row loops are compiled once for each level of the architecture that the
// compiler knows, and the machine chooses when it runs. They give the same bits, because nothing is fused and
// sums are folded in a fixed order. A file of row loops calls no function that another file could have
// compiled for a smaller machine, or it would be called there as well: no standard containers and algorithms.
#pragma once

#ifdef TOKCREDIT_LEVELS
// The version of `function` for this machine; it is declared in each level's namespace.
#define TOKCREDIT_CHOOSE(function)                                                                           \
  (__builtin_cpu_supports("x86-64-v4")   ? v4::function                                                      \
   : __builtin_cpu_supports("x86-64-v3") ? v3::function                                                      \
                                         : base::function)
#define TOKCREDIT_EACH_LEVEL(declaration)                                                                    \
  namespace base {                                                                                           \
  declaration                                                                                                \
  }                                                                                                          \
  namespace v3 {                                                                                             \
  declaration                                                                                                \
  }                                                                                                          \
  namespace v4 {                                                                                             \
  declaration                                                                                                \
  }
#else
#define TOKCREDIT_CHOOSE(function) base::function
#define TOKCREDIT_EACH_LEVEL(declaration)                                                                    \
  namespace base {                                                                                           \
  declaration                                                                                                \
  }
#endif
