// assert() in a kernel ends the launch, not the process. No include guard, as for the real one: a
// source that includes <cassert> again must get this meaning again.

#undef assert
#define assert(condition) \
  ((condition) ? static_cast<void>(0) : cudasim_trap("assertion failed: " #condition))
