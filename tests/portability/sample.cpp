// Prints the bits of results of the CPU operations on fixed numbers, for run.py to compare between machines.
#include "ops/divergence.hpp"
#include "ops/diverse.hpp"
#include "ops/logits.hpp"
#include "ops/policy_loss.hpp"
#include "ops/scan.hpp"
#include "ops/segment.hpp"
#include "ops/select.hpp"
#include "ops/tree.hpp"
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

using namespace tokcredit;

namespace {

constexpr int threads = 2;
constexpr int64_t size = 1200;
const std::vector<int64_t> begins = {0, 0, 7, 300, 301, 800}, ends = {0, 7, 290, 301, 777, 1200};
const int64_t rows_count = int64_t(begins.size());

// A fixed sequence of numbers, the same everywhere.
struct Sequence {
  uint64_t state = 12345;
  uint64_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return state >> 33;
  }
  double number(double low, double high) { return low + (high - low) * double(next()) / 2147483648.0; }
};

template <class T> std::vector<T> numbers(Sequence &from, int64_t count, double low, double high) {
  std::vector<T> out(size_t(count), T(0));
  for (T &x : out)
    x = T(from.number(low, high));
  return out;
}

std::vector<uint16_t> bfloat16(const std::vector<float> &from) {
  std::vector<uint16_t> out;
  for (float x : from) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    out.push_back(uint16_t(bits >> 16));
  }
  return out;
}

template <class T> void show(const char *name, const std::vector<T> &values) {
  for (size_t i = 0; i < values.size(); ++i) {
    uint64_t bits = 0;
    std::memcpy(&bits, &values[i], sizeof(T));
    std::printf("%s %zu %016llx %.9g\n", name, i, static_cast<unsigned long long>(bits), double(values[i]));
  }
}

template <class T> void floats(const char *suffix, Type type, const Rows &rows) {
  Sequence random;
  const std::string end = suffix;
  const auto x = numbers<T>(random, size, -3, 3), old = numbers<T>(random, size, -3, 0),
             now = numbers<T>(random, size, -3, 0), advantages = numbers<T>(random, size, -2, 2);
  std::vector<T> y(size), carry(rows_count), values(rows_count), slopes(size);
  cpu::scan({rows, type, x.data(), nullptr, y.data(), carry.data(), 0.95, true, false}, threads);
  show(("scan" + end).c_str(), y);
  for (Reduction reduction :
       {Reduction::sum, Reduction::mean, Reduction::var, Reduction::maximum, Reduction::logsumexp}) {
    cpu::segment_rows({rows, type, x.data(), reduction, 1, values.data()}, threads);
    show(("segment" + std::to_string(int(reduction)) + end).c_str(), values);
  }
  const auto factor = numbers<double>(random, rows_count, -3, 3),
             shift = numbers<double>(random, rows_count, -3, 3);
  cpu::row_affine({rows, type, x.data(), factor.data(), shift.data(), true, 0, 0, type, y.data()}, threads);
  show(("row affine" + end).c_str(), y);
  std::vector<double> stats(size_t(rows_count * loss_stats));
  for (Source source : {Source::difference, Source::cumulative})
    for (Surrogate surrogate : {Surrogate::clip, Surrogate::soft, Surrogate::k3}) {
      PolicyLoss loss{};
      loss.rows = rows, loss.type = type, loss.log_probs = now.data(), loss.reference = old.data();
      loss.advantages = {advantages.data(), Per::token, 0}, loss.weights = {nullptr, Per::batch, 0.5};
      const bool soft = surrogate == Surrogate::soft;
      loss.low = {nullptr, Per::batch, soft ? 1.0 : -0.2},
      loss.high = {nullptr, Per::batch, soft ? 1.05 : 0.3};
      loss.cap = {nullptr, Per::batch, 3};
      loss.surrogate = surrogate, loss.source = source, loss.on = Coordinate::ratio;
      loss.gated_value = GatedValue::score, loss.bound = 20, loss.power = 0, loss.limit = 1e30;
      loss.clamp_low = -1e30, loss.clamp_high = 1e30;
      loss.values = values.data(), loss.stats = stats.data(), loss.slopes = slopes.data();
      cpu::policy_loss(loss, threads);
      const std::string name = std::to_string(int(source)) + std::to_string(int(surrogate)) + end;
      show(("loss" + name).c_str(), values);
      show(("slopes" + name).c_str(), slopes);
    }
  std::vector<T> ranks(1);
  cpu::kth({rows, type, x.data(), nullptr, {nullptr, 0.3, Rounding::up, 1}, 1}, ranks.data(), threads);
  show(("kth" + end).c_str(), ranks);
}

void logits() {
  Sequence random;
  constexpr int64_t count = 9, vocabulary = 777;
  const auto plain = numbers<float>(random, count * vocabulary, -12, 12);
  const auto half = bfloat16(plain);
  std::vector<int64_t> tokens;
  for (int64_t i = 0; i < count; ++i)
    tokens.push_back(int64_t(random.next() % vocabulary));
  const std::vector<float> ones(count, 1.0f), twos(count, -2.0f);
  for (bool in_half : {false, true}) {
    const Type type = in_half ? Type::bf16 : Type::f32;
    const void *x = in_half ? static_cast<const void *>(half.data()) : plain.data();
    Logits in{};
    in.rows = count;
    in.vocabulary = in.ids = vocabulary;
    in.places = {count, 0, vocabulary};
    in.type = type;
    in.token_type = Type::i64;
    in.logits = x;
    in.tokens = tokens.data();
    in.temperature = 0.7;
    in.scale = 1;
    in.softcap = in_half ? INFINITY : 20;
    std::vector<float> log_probs(count), entropies(count), squares(count), gradient(count * vocabulary);
    std::vector<uint16_t> half_gradient(count * vocabulary);
    std::vector<double> logsumexp(count);
    cpu::logits({in, log_probs.data(), entropies.data(), squares.data(), nullptr, logsumexp.data()}, threads);
    void *out = in_half ? static_cast<void *>(half_gradient.data()) : gradient.data();
    cpu::logits_gradient({in, logsumexp.data(), entropies.data(), squares.data(), ones.data(), twos.data(),
                          ones.data(), nullptr, type, in.places, out},
                         threads);
    show(in_half ? "log_probs bf16" : "log_probs", log_probs);
    show(in_half ? "entropies bf16" : "entropies", entropies);
    show(in_half ? "squares bf16" : "squares", squares);
    if (in_half)
      show("gradient bf16", half_gradient);
    else
      show("gradient", gradient);
  }
}

void tree(const Rows &rows) {
  Sequence random;
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < size; ++i)
    tokens.push_back(int32_t(random.next() % 2));
  const std::vector<int64_t> group = {0, 0, 0, 1, 0, 1};
  const size_t capacity = size_t(2 * rows_count);
  std::vector<int64_t> leaf(rows_count), parent(capacity), of(capacity), depth(capacity), length(capacity),
      count(capacity), degree(capacity), nodes(1);
  cpu::tree_build({rows, Type::i32, tokens.data(), group.data(), 2, leaf.data(), parent.data(), of.data(),
                   depth.data(), length.data(), count.data(), degree.data(), nodes.data()},
                  threads);
  show("leaf", leaf);
  show("parent", parent);
  show("depth", depth);
  const auto rewards = numbers<double>(random, rows_count, 0, 1);
  std::vector<double> means(capacity);
  cpu::tree_mean({Type::f64, leaf.data(), parent.data(), nullptr, rewards.data(), true, means.data(),
                  rows_count, int64_t(capacity)});
  show("tree mean", means);
  std::vector<double> y(size);
  cpu::expand({rows, Type::f64, nullptr, leaf.data(), parent.data(), depth.data(), nullptr, means.data(),
               y.data(), int64_t(capacity)},
              threads);
  show("expand", y);
}

void diverse(const Rows &rows) {
  Sequence random;
  constexpr int64_t width = 77;
  const auto vectors = numbers<float>(random, size * width, -1, 1),
             score = numbers<float>(random, size, 0, 1);
  const auto half = bfloat16(vectors);
  const std::vector<int64_t> number(rows_count, 40);
  std::vector<int64_t> order(size);
  for (bool product : {false, true}) {
    cpu::diverse({rows, Type::f32, vectors.data(), width, score.data(), number.data(), 40, 0.5f, product,
                  order.data()},
                 threads);
    show("diverse", order);
    cpu::diverse(
        {rows, Type::bf16, half.data(), width, score.data(), number.data(), 40, 0.5f, product, order.data()},
        threads);
    show("diverse bf16", order);
  }
}

} // namespace

int main() {
  Sequence random;
  std::vector<char> bits;
  for (int64_t i = 0; i < size; ++i)
    bits.push_back(random.next() % 5 != 0);
  const Rows rows{begins.data(), ends.data(), reinterpret_cast<const bool *>(bits.data()), rows_count, size};
  floats<float>(" f32", Type::f32, rows);
  floats<double>(" f64", Type::f64, rows);
  logits();
  tree(rows);
  diverse(rows);
}
