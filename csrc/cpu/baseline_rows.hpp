#pragma once
#include "cpu/level.hpp"
#include "ops/baseline.hpp"

namespace tokcredit::cpu {

// Offsets that a group's rows are walked over together.
constexpr int64_t stretch = 1024;

// What is carried along a row from stretch to stretch.
struct Course {
  double energy; // up to the stretch
  double *to_go; // [stretches of the row + 1], rewards from each stretch on
};

// One group, of `count` rows, with a Course for each.
TOKCREDIT_EACH_LEVEL(void baseline_group(const Baseline &b, const int64_t *members, int64_t count,
                                         Course *courses);)

} // namespace tokcredit::cpu
