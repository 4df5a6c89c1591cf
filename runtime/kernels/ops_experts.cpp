// Mixtures of experts as ONNX Runtime sees them: routing, and the products of the experts that a store has or reads.
#include <cmath>
#include <numeric>
#include <vector>

#include "experts.h"
#include "isa.h"
#include "operator.h"
#include "ops_experts.h"
#include "scratch.h"
#include "spread.h"

namespace shoal {
namespace {

constexpr int kMostChosen = 64;

// Who goes where: of each row `top_k` experts, the highest score first, and what theirs weighs.
struct Routing {
  int64_t layer, experts, total, top_k;
  bool normalised, sigmoid, equal;
  float scale;

  explicit Routing(const OrtKernelInfo* info)
      : layer(integer(info, "layer", -1)), experts(integer(info, "experts", 0)), total(integer(info, "total", 0)),
        top_k(integer(info, "top_k", 0)), normalised(integer(info, "normalised", 0) == 1),
        sigmoid(integer(info, "sigmoid", 0) == 1), equal(integer(info, "equal", 0) == 1), scale(number(info, "scale", 1)) {
    if (layer < 0 || experts < 1 || experts > total || total > 4096 || top_k < 1 || top_k > std::min<int64_t>(total, kMostChosen))
      refuse("Of %lld experts %lld cannot be chosen.", total, top_k);
  }

  // The store that input `index` names, if it has such a layer.
  std::shared_ptr<Experts> store(const Context& context, size_t index) const {
    Tensor handle = context.input(index, ort::kInt64);
    if (handle.count != 1) refuse("There are %lld handles of experts, not one.", handle.count);
    auto found = experts_of(*handle.as<int64_t>());
    if (!found) refuse("There are no experts %lld.", *handle.as<int64_t>());
    if (layer >= found->options().layers || experts != found->options().experts)
      refuse("The store has %lld layers of %lld experts.", found->options().layers, found->options().experts);
    return found;
  }

  // Of rows of logits: ids [rows][top_k], weights [rows][top_k], scores [rows][total].
  void choose(const float* logits, int64_t rows, int32_t* ids, float* weights, float* scores, const Parallel& parallel) const {
    constexpr int64_t kStep = 16;
    parallel((rows + kStep - 1) / kStep, [&](int64_t item) {
      choose(logits, item * kStep, std::min(rows, (item + 1) * kStep), ids, weights, scores);
    });
  }

  void choose(const float* logits, int64_t first, int64_t last, int32_t* ids, float* weights, float* scores) const {
    std::vector<int32_t> order(static_cast<size_t>(total));
    for (int64_t row = first; row < last; ++row) {
      const float* of = logits + row * total;
      float* score = scores + row * total;
      float sum = 0, top = of[0];
      for (int64_t e = 1; e < total; ++e) top = std::max(top, of[e]);
      for (int64_t e = 0; e < total; ++e) {
        score[e] = sigmoid ? 1 / (1 + std::exp(-of[e])) : std::exp(of[e] - top);
        sum += score[e];
      }
      if (!sigmoid)
        for (int64_t e = 0; e < total; ++e) score[e] /= sum;
      std::iota(order.begin(), order.end(), 0);
      // By logits: scores may meet where these do not. What is no number comes last
      auto higher = [&](int32_t a, int32_t b) {
        const float x = std::isnan(of[a]) ? -INFINITY : of[a], y = std::isnan(of[b]) ? -INFINITY : of[b];
        return x > y || (x == y && a < b);
      };
      std::partial_sort(order.begin(), order.begin() + top_k, order.end(), higher);
      float chosen = 0;
      for (int64_t i = 0; i < top_k; ++i) chosen += score[order[static_cast<size_t>(i)]];
      for (int64_t i = 0; i < top_k; ++i) {
        const int32_t id = order[static_cast<size_t>(i)];
        ids[row * top_k + i] = id;
        weights[row * top_k + i] = equal ? scale : score[id] / (normalised ? chosen : 1) * scale;
      }
    }
  }
};

// One expert's share of a layer's rows.
struct Share {
  int expert;
  std::vector<int32_t> places;  // row * top_k + rank
};

// The experts that rows need, most rows first, then the heavier, and how each is wanted.
std::vector<Share> shares(const Routing& routing, int64_t rows, const int32_t* ids) {
  std::vector<Share> all(static_cast<size_t>(routing.experts));
  for (int64_t at = 0; at < rows * routing.top_k; ++at)
    if (ids[at] < routing.experts) all[static_cast<size_t>(ids[at])].places.push_back(static_cast<int32_t>(at));
  std::vector<Share> found;
  for (size_t e = 0; e < all.size(); ++e)
    if (!all[e].places.empty()) {
      all[e].expert = static_cast<int>(e);
      found.push_back(std::move(all[e]));
    }
  std::stable_sort(found.begin(), found.end(), [](const Share& a, const Share& b) {
    return a.places.size() != b.places.size() ? a.places.size() > b.places.size() : a.places[0] < b.places[0];
  });
  return found;
}

// How who is chosen first, second, .. is read where it is not there, below 0 not at all; empty: all in full. What one does
// not matter (HOBBIT, Tang et al. 2024): the weights before it, over all. One row only: a prompt's experts each have some
// row for which they matter.
std::vector<int> by_rank(const Experts& store, const Routing& routing, int64_t rows, const float* weights) {
  const ExpertOptions& options = store.options();
  if (rows != 1 || (options.low >= 1 && options.skip >= 1)) return {};
  float sum = 0, before = 0;
  for (int64_t i = 0; i < routing.top_k; ++i) sum += weights[i];
  std::vector<int> found;
  for (int64_t i = 0; i < routing.top_k; before += weights[i++]) {
    const float unimportant = sum > 0 ? before / sum : 0;
    found.push_back(unimportant > options.skip ? -1 : unimportant > options.low && store.precisions() > 1 ? 1 : 0);
  }
  return found;
}

// How each of `wanted` is, without those that are neither there nor worth reading; empty: all in full.
std::vector<int> precisions(Experts& store, const Routing& routing, const std::vector<int>& ranks, std::vector<Share>& wanted) {
  if (ranks.empty()) return {};
  std::vector<int> found;
  std::vector<Share> kept;
  for (Share& share : wanted) {
    const int precision = ranks[static_cast<size_t>(share.places[0])];
    if (precision < 0 && !store.resident(static_cast<int>(routing.layer), share.expert)) {
      store.skipped();
      continue;
    }
    kept.push_back(std::move(share));
    found.push_back(precision < 0 ? store.precisions() - 1 : precision);  // what is not worth reading will do as it is
  }
  wanted = std::move(kept);
  return found;
}

void note(Experts& store, const Routing& routing, int64_t rows, const float* x, int64_t hidden, const int32_t* ids, const float* scores) {
  const auto layer = static_cast<size_t>(routing.layer);
  std::vector<int32_t> ffn(static_cast<size_t>(routing.top_k));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < routing.top_k; ++i) {
      const int32_t id = ids[row * routing.top_k + i];
      ffn[static_cast<size_t>(i)] = id < routing.experts ? id : -1;
    }
    store.routed(static_cast<int>(routing.layer), ffn.data(), static_cast<int>(routing.top_k), scores + row * routing.total);
    auto& trace = store.trace;
    if (!trace.on || static_cast<int64_t>(trace.ids[layer].size()) / routing.top_k >= trace.most) continue;
    for (int32_t id : ffn) trace.ids[layer].push_back(static_cast<int16_t>(id));
    if (trace.scores) trace.score[layer].insert(trace.score[layer].end(), scores + row * routing.total, scores + row * routing.total + routing.experts);
    if (trace.inputs && x) trace.input[layer].insert(trace.input[layer].end(), x + row * hidden, x + (row + 1) * hidden);
  }
}

// y = x, unchanged; begins the reads of what Experts of this layer is going to need. Inputs: x, logits, experts.
struct RouteExperts {
  static constexpr const char* name = "RouteExperts";
  static constexpr int inputs[] = {ort::kFloat, ort::kFloat, ort::kInt64};
  static constexpr size_t required = 3;
  static constexpr int outputs[] = {ort::kFloat};

  Routing routing;

  explicit RouteExperts(const OrtKernelInfo* info) : routing(info) {}

  void compute(const Context& context) const {
    Tensor x = context.input(0, ort::kFloat), logits = context.input(1, ort::kFloat);
    if (logits.last() != routing.total) refuse("Rows have %lld logits, not %lld.", logits.last(), routing.total);
    const int64_t rows = logits.count / routing.total;
    auto store = routing.store(context, 2);
    std::memcpy(context.output(0, x.dims, x.rank), x.data, static_cast<size_t>(x.count) * sizeof(float));
    std::vector<int32_t> ids(static_cast<size_t>(rows * routing.top_k));
    std::vector<float> weights(ids.size()), scores(static_cast<size_t>(rows * routing.total));
    routing.choose(logits.as<const float>(), rows, ids.data(), weights.data(), scores.data(), context.parallel());
    std::lock_guard<std::mutex> running(store->running);
    store->early.reset();
    note(*store, routing, rows, nullptr, 0, ids.data(), scores.data());
    auto wanted = shares(routing, rows, ids.data());
    auto how = precisions(*store, routing, by_rank(*store, routing, rows, weights.data()), wanted);
    std::vector<int> experts;
    for (const Share& share : wanted) experts.push_back(share.expert);
    store->early = store->begin(static_cast<int>(routing.layer), experts, how);
  }
};

// y [.., hidden] and gates [.., total]; inputs: x, logits, experts, residual?
struct ExpertsOperator {
  static constexpr const char* name = "Experts";
  static constexpr int inputs[] = {ort::kFloat, ort::kFloat, ort::kInt64, ort::kFloat};
  static constexpr size_t required = 3;
  static constexpr int outputs[] = {ort::kFloat, ort::kFloat};

  Routing routing;
  int64_t hidden, ffn;
  Activation activation;

  explicit ExpertsOperator(const OrtKernelInfo* info)
      : routing(info), hidden(integer(info, "hidden", 0)), ffn(integer(info, "ffn", 0)) {
    const int64_t kind = integer(info, "activation", 0);
    if (kind < 1 || kind > 4) refuse("There is no gate %lld.", kind);
    activation = static_cast<Activation>(kind);
  }

  void compute(const Context& context) const {
    Tensor x = context.input(0, ort::kFloat), logits = context.input(1, ort::kFloat), residual = context.optional(3);
    if (!x.rank || x.last() != hidden || logits.last() != routing.total || x.count / hidden != logits.count / routing.total)
      refuse("Rows have %lld values and %lld logits.", x.last(), logits.last());
    if (residual && (residual.type != ort::kFloat || residual.count != x.count)) refuse("The residual has %lld values, not %lld.", residual.count, x.count);
    const int64_t rows = x.count / hidden;
    auto store = routing.store(context, 2);
    if (store->hidden() != hidden || store->ffn() != ffn) refuse("The store's experts are %lld to %lld.", store->hidden(), store->ffn());
    auto y = reinterpret_cast<float*>(context.output(0, x.dims, x.rank));
    auto gates = reinterpret_cast<float*>(context.output(1, logits.dims, logits.rank));
    std::vector<int32_t> ids(static_cast<size_t>(rows * routing.top_k));
    std::vector<float> weights(ids.size()), scores(static_cast<size_t>(rows * routing.total));
    routing.choose(logits.as<const float>(), rows, ids.data(), weights.data(), scores.data(), context.parallel());
    std::fill(gates, gates + logits.count, 0.f);
    for (int64_t at = 0; at < rows * routing.top_k; ++at) gates[at / routing.top_k * routing.total + ids[static_cast<size_t>(at)]] = weights[static_cast<size_t>(at)];

    std::lock_guard<std::mutex> running(store->running);
    auto wanted = shares(routing, rows, ids.data());
    std::unique_ptr<Experts::Pass> pass = std::move(store->early);
    if (pass && pass->layer() != routing.layer) pass.reset();
    if (!pass) {
      note(*store, routing, rows, x.as<const float>(), hidden, ids.data(), scores.data());
      const auto ranks = by_rank(*store, routing, rows, weights.data());
      auto how = precisions(*store, routing, ranks, wanted);
      std::vector<int> experts;
      for (const Share& share : wanted) experts.push_back(share.expert);
      pass = store->begin(static_cast<int>(routing.layer), experts, how);
      // Who matters how much in the next layer is not known yet: by rank it is much as in this one
      store->guess(static_cast<int>(routing.layer), x.as<const float>(), rows, static_cast<int>(routing.top_k), ranks);
    } else if (pass->size() != wanted.size()) {  // it left out what does not matter
      std::vector<Share> kept;
      for (Share& share : wanted)
        if (pass->wants(share.expert)) kept.push_back(std::move(share));
      wanted = std::move(kept);
    }

    Scratch scratch(static_cast<size_t>(rows * routing.top_k * hidden) * sizeof(float));
    float* products = scratch.take<float>(rows * routing.top_k * hidden);
    if (!scratch) refuse("Memory ran out for %lld rows.", rows);
    std::vector<char> there(ids.size(), 0);
    const LinearPath& path = linear_path();
    const Parallel parallel = context.parallel();
    try {
      for (auto ready = pass->next(); !ready.empty(); ready = pass->next()) {
        if (rows == 1) {
          one(path, *store, wanted, ready, x.as<const float>(), products, parallel);
        } else {
          for (const ExpertReady& which : ready) several(path, *store, wanted[static_cast<size_t>(which.index)], which, x.as<const float>(), products, parallel);
        }
        for (const ExpertReady& which : ready) {
          for (int32_t place : wanted[static_cast<size_t>(which.index)].places) there[static_cast<size_t>(place)] = 1;
          pass->done(which);
        }
      }
    } catch (const ExpertError& error) {
      throw Refused{call<ort::kCreateStatus, ort::CreateStatus>(ort::kFail, error.what.c_str())};
    }
    const int64_t step = 8;
    parallel((rows + step - 1) / step, [&](int64_t item) {
      for (int64_t row = item * step; row < std::min(rows, (item + 1) * step); ++row) {
        float* to = y + row * hidden;
        if (residual) std::memcpy(to, residual.as<const float>() + row * hidden, static_cast<size_t>(hidden) * sizeof(float));
        else std::fill(to, to + hidden, 0.f);
        for (int64_t place = row * routing.top_k; place < (row + 1) * routing.top_k; ++place) {
          if (!there[static_cast<size_t>(place)]) continue;
          const float* from = products + place * hidden;
          const float weight = weights[static_cast<size_t>(place)];
          for (int64_t i = 0; i < hidden; ++i) to[i] += weight * from[i];
        }
      }
    });
  }

  // One row: all of these experts together, so that threads meet twice and not for each.
  void one(const LinearPath& path, const Experts& store, const std::vector<Share>& wanted, const std::vector<ExpertReady>& ready,
           const float* x, float* products, const Parallel& parallel) const {
    for (int precision = 0; precision < store.precisions(); ++precision) {
      std::vector<const ExpertReady*> these;
      for (const ExpertReady& which : ready)
        if (which.precision == precision) these.push_back(&which);
      if (these.empty()) continue;
      const ExpertRecords& records = store.records(precision);
      const auto count = static_cast<int64_t>(these.size());
      Scratch scratch(static_cast<size_t>(count) * Scratch::round_up(static_cast<size_t>(ffn) * sizeof(float)));
      if (!scratch) refuse("Memory ran out for %lld experts.", count);
      float* between = scratch.take<float>(count * static_cast<int64_t>(Scratch::round_up(static_cast<size_t>(ffn) * sizeof(float)) / sizeof(float)));
      LinearCall gated{1, x, nullptr, nullptr, 0, nullptr, nullptr, activation, nullptr};
      const Quantized in(records.gate_up, 1);
      Scratch dealt(records.gathered ? static_cast<size_t>(records.gate_up.padded()) : 0);
      auto words = dealt.take<uint32_t>(0);
      if (!in || !dealt || !quantize_rows(path, records.gate_up, gated, in.a, parallel)) refuse("Memory ran out for %lld rows.", 1);
      if (records.gathered) deal(records.gate_up, in.a, 0, words);
      auto call = [&](int64_t which) {
        LinearCall call = gated;
        call.weights = these[static_cast<size_t>(which)]->record;
        call.y = between + which * ffn;
        return call;
      };
      if (records.gathered) {
        gates(path, records.gate_up, in.a, words, count, call, parallel);
      } else {
        in_pieces(records.gate_up, 2, count, parallel, [&](int64_t which, int64_t panel) { panels(path, records.gate_up, in.a, call(which), panel, 2); });
      }
      std::vector<std::unique_ptr<Quantized>> out;
      std::vector<LinearCall> calls;
      for (int64_t which = 0; which < count; ++which) {
        const ExpertReady& of = *these[static_cast<size_t>(which)];
        out.push_back(std::make_unique<Quantized>(records.down, 1));
        calls.push_back({1, between + which * ffn, of.record + records.down_at(), nullptr, 0, nullptr, nullptr, Activation::none,
                         products + wanted[static_cast<size_t>(of.index)].places[0] * hidden});
        if (!*out.back() || !quantize_rows(path, records.down, calls.back(), out.back()->a, parallel)) refuse("Memory ran out for %lld rows.", 1);
      }
      if (records.gathered) {
        downs(path, records.down, out, calls, parallel);
      } else {
        in_pieces(records.down, 1, count, parallel, [&](int64_t which, int64_t panel) {
          panels(path, records.down, out[static_cast<size_t>(which)]->a, calls[static_cast<size_t>(which)], panel, 1);
        });
      }
    }
  }

  // Calls use(which, panel) for every `unit`th panel of `count` matrices of one format, in pieces of some bytes each.
  template <class Use>
  static void in_pieces(const LinearFormat& f, int64_t unit, int64_t count, const Parallel& parallel, Use&& use) {
    const int64_t units = f.panels() / unit + (f.panels() % unit != 0);
    const int64_t step = std::max<int64_t>(1, kPieceBytes / f.panel_bytes() / unit);
    in_runs(parallel, units * count, step, [&](int64_t from, int64_t to) {
      for (int64_t at = from; at < to; ++at) use(at / units, at % units * unit);
    });
  }

  static void panels(const LinearPath& path, const LinearFormat& f, const Activations& a, const LinearCall& call, int64_t panel, int64_t unit) {
    alignas(64) float sums[2 * kPanel];
    for (int64_t p = 0; p < unit; ++p) path.dot(f, call.weights + (panel + p) * f.panel_bytes(), a, 0, 1, sums + p * kPanel, 2 * kPanel);
    path.finish(f, call, sums, 2 * kPanel, 0, 1, panel, unit);
  }

  // Gathered gates, and then what of their ups these let through: memory gives a gate faster while nobody asks for rows
  // from elsewhere.
  template <class Call>
  void gates(const LinearPath& path, const LinearFormat& f, const Activations& a, const uint32_t* dealt, int64_t count, Call&& call,
             const Parallel& parallel) const {
    const int64_t units = f.panels() / 2, step = std::max<int64_t>(1, kPieceBytes / f.panel_bytes());
    Scratch scratch(static_cast<size_t>(count * units * 2 * kPanel) * sizeof(float));
    float* sums = scratch.take<float>(0);
    if (!scratch) refuse("Memory ran out for %lld experts.", count);
    in_runs(parallel, units * count, step, [&](int64_t from, int64_t to) {
      for (int64_t at = from; at < to; ++at)
        path.dot(f, call(at / units).weights + at % units * f.panel_bytes(), a, 0, 1, sums + at * 2 * kPanel, 2 * kPanel);
    });
    auto up = [&](int64_t at) { return up_at(f, call(at / units).weights, at % units); };
    auto open = [&](int64_t at) {
      unsigned found = 0;
      for (unsigned r = 0; r < kPanel; ++r)
        found |= static_cast<unsigned>(activation != Activation::relu || !(sums[at * 2 * kPanel + r] <= 0)) << r;
      return found;
    };
    in_runs(parallel, units * count, step, [&](int64_t from, int64_t to) {
      for (int64_t at = from; at < to; ++at) {
        float* found = sums + at * 2 * kPanel;
        std::fill(found + kPanel, found + 2 * kPanel, 0.f);
        if (at + 1 < units * count) want_rows(f, up(at + 1), open(at + 1));
        path.rows(f, up(at), a, dealt, open(at), found + kPanel);
        path.finish(f, call(at / units), found, 2 * kPanel, 0, 1, at % units * 2, 2);
      }
    });
  }

  // Gathered downs, each of a row's channels that are not 0. A thread takes whole channels where there are experts enough:
  // memory gives long pieces faster.
  static void downs(const LinearPath& path, const LinearFormat& f, const std::vector<std::unique_ptr<Quantized>>& rows,
                    const std::vector<LinearCall>& calls, const Parallel& parallel) {
    const auto count = static_cast<int64_t>(calls.size());
    const int64_t all = lines(f), parts = std::min<int64_t>(all, (4 * parallel.threads + count - 1) / count);
    Scratch scratch(static_cast<size_t>(count) * Scratch::round_up(static_cast<size_t>(f.inputs) * sizeof(int32_t)));
    if (!scratch) refuse("Memory ran out for %lld experts.", count);
    std::vector<std::pair<int32_t*, int64_t>> active;
    for (const auto& row : rows) {
      int32_t* to = scratch.take<int32_t>(f.inputs);
      active.emplace_back(to, channels(f, row->a, 0, to));
    }
    bool enough = true;
    in_runs(parallel, parts * count, 1, [&](int64_t from, int64_t to) {
      for (int64_t at = from; at < to; ++at) {
        const auto which = static_cast<size_t>(at / parts);
        const int64_t first = at % parts * all / parts, some = (at % parts + 1) * all / parts - first;
        const int64_t n = first * line_outputs(f), outputs = some * line_outputs(f);
        Scratch room(2 * Scratch::round_up(static_cast<size_t>(outputs) * sizeof(float)));
        if (!room) return __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
        auto sums = room.take<int32_t>(outputs);
        auto out = room.take<float>(outputs);
        path.columns(f, calls[which].weights, rows[which]->a, active[which].first, active[which].second, first, some, sums, out);
        std::memcpy(calls[which].y + n, out, static_cast<size_t>(std::min(outputs, f.outputs - n)) * sizeof(float));
      }
    });
    if (!enough) refuse("Memory ran out for %lld experts.", count);
  }

  void several(const LinearPath& path, const Experts& store, const Share& share, const ExpertReady& ready, const float* x,
               float* products, const Parallel& parallel) const {
    const ExpertRecords& records = store.records(ready.precision);
    const auto count = static_cast<int64_t>(share.places.size());
    Scratch scratch(static_cast<size_t>(count) * static_cast<size_t>(2 * hidden + ffn) * sizeof(float) + 192);
    float* in = scratch.take<float>(count * hidden);
    float* between = scratch.take<float>(count * ffn);
    float* out = scratch.take<float>(count * hidden);
    if (!scratch) refuse("Memory ran out for %lld rows.", count);
    auto row = [&](int64_t i) { return share.places[static_cast<size_t>(i)]; };
    for (int64_t i = 0; i < count; ++i) std::memcpy(in + i * hidden, x + row(i) / routing.top_k * hidden, static_cast<size_t>(hidden) * sizeof(float));
    const LinearCall gated{count, in, ready.record, nullptr, 0, nullptr, nullptr, activation, between};
    const LinearCall down{count, between, ready.record + records.down_at(), nullptr, 0, nullptr, nullptr, Activation::none, out};
    const bool enough = records.gathered ? gathered_gate_up(path, records.gate_up, gated, parallel) && gathered_down(path, records.down, down, parallel)
                                         : linear(path, records.gate_up, gated, parallel) && linear(path, records.down, down, parallel);
    if (!enough) refuse("Memory ran out for %lld rows.", count);
    for (int64_t i = 0; i < count; ++i) std::memcpy(products + static_cast<int64_t>(row(i)) * hidden, out + i * hidden, static_cast<size_t>(hidden) * sizeof(float));
  }
};

}  // namespace

const OrtCustomOp* experts_operator() {
  static Registered<ExpertsOperator> found;
  return &found;
}

const OrtCustomOp* route_experts_operator() {
  static Registered<RouteExperts> found;
  return &found;
}

}  // namespace shoal
