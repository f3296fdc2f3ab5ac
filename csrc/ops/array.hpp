// What every contract is written in: typed contiguous arrays, and rows as spans of flat token buffers.
#pragma once
#include <cstdint>

// An enumeration, and its words in their order as one string, from which the binding tells Python.
#define TOKCREDIT_ENUM(Name, ...)                                                                            \
  enum class Name : int32_t { __VA_ARGS__ };                                                                 \
  constexpr const char *Name##_words = #__VA_ARGS__;

namespace tokcredit {

enum class Type : int32_t { f32, f64, bf16, f16, i32, i64, b8 };
constexpr const char *Type_words =
    "float32, float64, bfloat16, float16, int32, int64, bool"; // as torch has them

constexpr int64_t bytes_of(Type type) {
  return type == Type::f64 || type == Type::i64    ? 8
         : type == Type::f32 || type == Type::i32  ? 4
         : type == Type::bf16 || type == Type::f16 ? 2
                                                   : 1;
}

constexpr bool is_float(Type type) {
  return type == Type::f32 || type == Type::f64 || type == Type::bf16 || type == Type::f16;
}

// Row r is the span [begin[r], end[r]) of every buffer of `size` tokens. Spans are disjoint and in increasing
// order; tokens between them are padding, and every operation writes 0 there. `mask` may be null (all true);
// a token that is false takes no part: its values are never read into a result, so NaN under it is harmless.
struct Rows {
  const int64_t *begin;
  const int64_t *end;
  const bool *mask;
  int64_t count;
  int64_t size;
};

} // namespace tokcredit
