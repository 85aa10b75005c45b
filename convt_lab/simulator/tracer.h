// Counts what a warp does, and looks for hazards, in a launch of an instrumented kernel.
//
// The kernel is compiled with GCC's -fsanitize=thread, which puts a call before every load and
// store, with its address, and one at the start and end of every function. The sanitizer's library
// is not linked: the calls end here. The translation adds calls at loops (translate.py).
//
// A block's threads run one after the other, so what the 32 lanes of a warp would do together has
// to be put together. SIMT hardware runs a statement once for all lanes that come to it: those on
// one side of a branch, those that are still in a loop; the others wait behind the branch or loop.
// So two lanes execute a load together exactly if it is the same instruction, in the same iteration
// of every loop around it, within the same calls. Iterations and calls are a lane's context, and a
// warp's accesses with the same instruction and context are one request. No order of the code has
// to be known for that, and it does not matter how the compiler laid it out.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "runtime.h"

namespace cudasim {

constexpr int kLanes = 32;
constexpr int kSectorBytes = 32;
constexpr int kBanks = 32;
constexpr int kBankBytes = 4;
constexpr std::uint64_t kReach = std::uint64_t{8} << 30;  // as runtime.cpp's kGuardBytes
// What is kept of accesses that other lanes may still join, in all warps of a block.
constexpr std::uint64_t kMostOpenBytes = std::uint64_t{1} << 30;
// What is worth freeing where nobody can join any more, and the most that is kept for the next use.
constexpr std::size_t kManyEntries = 1 << 16;

enum Operation : std::uint8_t { kLoad = 1, kStore, kAtomic };

class Tracer {
 public:
  explicit Tracer(const CudasimTrace& setup) : setup_(setup) {
    for (std::size_t i = 0; i < setup.buffer_count; ++i) {
      const CudasimBuffer& buffer = setup.buffers[i];
      State state;
      state.buffer = buffer;
      if (buffer.space == CUDASIM_GLOBAL) {
        state.touched.resize(buffer.bytes / kSectorBytes + 1);
        state.loads.resize(buffer.bytes / buffer.granule + 1);
        if (buffer.starts_unwritten) find_unwritten(state);
      }
      states_.push_back(std::move(state));
    }
  }

  // ---- What the worker reports ----------------------------------------------------------------

  void begin_launch(const CudasimLaunch& launch, const char* shared, const char* dynamic,
                    std::uintptr_t library, std::uintptr_t library_end) {
    arguments_ = reinterpret_cast<std::uint64_t>(launch.call);
    arguments_end_ = arguments_ + launch.call_bytes;
    grid_size_ = launch.grid;
    block_size_ = launch.block;
    threads_ = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
    library_ = library;
    library_end_ = library_end;
    lanes_.assign(threads_, {});
    warps_.clear();
    warps_.resize((threads_ + kLanes - 1) / kLanes);
    clocks_.assign((threads_ + kLanes - 1) / kLanes, 0);
    const auto base = reinterpret_cast<std::uint64_t>(shared);
    for (State& state : states_) {
      if (state.buffer.space == CUDASIM_STATIC_SHARED) {
        state.start = base + state.buffer.start;
      } else if (state.buffer.space == CUDASIM_DYNAMIC_SHARED) {
        state.start = reinterpret_cast<std::uint64_t>(dynamic);
        state.buffer.bytes = launch.shared_bytes;
      } else {
        state.start = state.buffer.start;
      }
      if (state.buffer.space == CUDASIM_GLOBAL) {
        state.writes.clear();  // a launch begins when the one before it is done
      } else {
        state.words.assign(state.buffer.bytes / 4 + 2, {});
      }
    }
    by_address_.clear();
    for (std::size_t i = 0; i < states_.size(); ++i) {
      if (states_[i].buffer.bytes > 0) by_address_.emplace(states_[i].start, i);
    }
  }

  void begin_block(CudasimIndex index, std::uint64_t linear) {
    block_ = index;
    block_number_ = static_cast<std::uint32_t>(linear + 1);
    ++block_serial_;
    ++epoch_;
    for (Lane& lane : lanes_) lane = {};
    barrier_site_ = 0;
    exited_ = -1;
  }

  void run_thread(int thread, const CudasimIndex& index, const char* stack, std::size_t bytes) {
    thread_ = thread;
    index_ = index;
    lane_ = &lanes_[thread];
    bit_ = thread % kLanes;
    warp_ = &warps_[thread / kLanes];
    if (warp_->requests == nullptr) {
      warp_->requests = take(spare_requests_);
      warp_->shared_requests = 0;
    }
    if (warp_->contexts == nullptr) warp_->contexts = take(spare_contexts_);
    const bool is_last = warp_->finished + 1 == lanes_of(thread / kLanes);
    if (is_last && !warp_->has_last_lane) {
      warp_->shared_requests = warp_->requests->list().size();
      warp_->shared_contexts = warp_->contexts->size();
    }
    warp_->has_last_lane = is_last;
    stack_ = reinterpret_cast<std::uint64_t>(stack);
    stack_end_ = stack_ + bytes;
  }

  void stop() { lane_ = nullptr; }

  void arrive_at_barrier(std::uint64_t site) {
    if (barrier_site_ == 0) {
      barrier_site_ = site;
      barrier_index_ = index_;
      if (exited_ >= 0) note_divergence(site, exited_index_);
    } else if (site != barrier_site_) {
      note_divergence(site, barrier_index_);
    }
  }

  void finish_thread() {
    lane_ = nullptr;
    exited_ = thread_;
    exited_index_ = index_;
    if (barrier_site_ != 0) note_divergence(barrier_site_, barrier_index_);
    if (++warp_->finished == lanes_of(thread_ / kLanes)) close(*warp_);
  }

  // All waiting threads of the block go on; nothing before orders after.
  void release_barrier() {
    for (Warp& warp : warps_) count_requests(warp);
    ++epoch_;
    barrier_site_ = 0;
  }

  void release_warp(int warp) {
    count_requests(warps_[warp]);
    ++clocks_[warp];
  }

  void end_block() {
    for (Warp& warp : warps_) {
      close(warp);
      warp.finished = 0;
    }
  }

  // ---- What the instrumented kernel reports ---------------------------------------------------

  // Returns false when the launch has taken more steps than it may.
  bool take_step() { return lane_ == nullptr || ++steps_ <= setup_.max_steps; }

  // Whether a thread is so far ahead of others that what it did can't be kept until they come.
  bool is_full() const { return open_bytes_ > kMostOpenBytes; }
  std::size_t open_requests() const { return warp_->requests->list().size(); }
  std::size_t open_contexts() const { return warp_->contexts->size(); }

  void enter_loop() {
    if (lane_ == nullptr) return;
    lane_->context = warp_->contexts->enter_loop(lane_->context);
    free_complete();
  }
  void next_iteration() {
    if (lane_ == nullptr) return;
    lane_->context = warp_->contexts->next_iteration(lane_->context);
    free_complete();
  }
  void enter_function(std::uint64_t caller) {
    if (lane_ == nullptr) return;
    const auto call = static_cast<std::uint32_t>(caller - library_);
    lane_->context = warp_->contexts->enter_function(lane_->context, call);
    ++lane_->depth;
    free_complete();
  }
  void leave_loop() {
    if (lane_ != nullptr) lane_->context = warp_->contexts->outer(lane_->context);
  }
  void leave_function() {
    if (lane_ == nullptr || lane_->depth == 0) return;  // of the code that started the thread
    lane_->context = warp_->contexts->outer(lane_->context);
    --lane_->depth;
  }

  void count_fma() { fma_ += lane_ != nullptr; }
  void count_tensor_fma(int count) {
    if (lane_ != nullptr) tensor_fma_ += count;
  }

  // Returns why the launch must end, or null.
  const char* access(std::uint64_t pc, std::uint64_t address, std::uint32_t bytes, Operation op) {
    if (lane_ == nullptr) return nullptr;
    if (address >= stack_ && address < stack_end_) return nullptr;  // a local variable
    if (address >= arguments_ && address < arguments_end_) return nullptr;
    const int index = find(address, bytes);
    if (index < 0) {
      // Constants and __device__ variables.
      if (address >= library_ && address < library_end_) return nullptr;
      note(CUDASIM_OUT_OF_BOUNDS, pc, nearest(address), address, {}, {});
      return op == kLoad ? "read outside every buffer" : "write outside every buffer";
    }
    if (bytes > 1 && bytes <= 16 && (bytes & (bytes - 1)) == 0 && address % bytes != 0) {
      note(CUDASIM_MISALIGNED, pc, index, address, {}, {});
      return "misaligned access";
    }
    State& state = states_[index];
    if (state.buffer.space == CUDASIM_GLOBAL) {
      check_global(state, index, pc, address, bytes, op);
    } else {
      check_shared(state, index, pc, address, bytes, op);
    }
    const auto instruction = static_cast<std::uint32_t>(pc - library_);
    warp_->requests->add({lane_->context, instruction, index, bytes, op}, bit_,
                         address - state.start, lane_->next);
    free_complete();
    return nullptr;
  }

  // ---- Results ----------------------------------------------------------------------------------

  std::uint64_t fma() const { return fma_; }
  std::uint64_t tensor_fma() const { return tensor_fma_; }
  std::uint64_t steps() const { return steps_; }
  std::uint64_t blocks() const { return block_serial_; }
  std::uint64_t grid_blocks() const {
    return static_cast<std::uint64_t>(grid_size_.x) * grid_size_.y * grid_size_.z;
  }

  const std::vector<CudasimSite>& sites() {
    site_list_.clear();
    for (const auto& [key, site] : sites_) site_list_.push_back(site);
    return site_list_;
  }
  const std::vector<CudasimHazard>& hazards() const { return hazards_; }
  std::uint64_t footprint(std::size_t buffer) const {
    const auto& touched = states_[buffer].touched;
    return std::count(touched.begin(), touched.end(), true);
  }
  const std::vector<std::uint32_t>& loads(std::size_t buffer) const {
    return states_[buffer].loads;
  }
  // The first request of each site: 32 addresses relative to the buffer, and the lanes that took
  // part.
  const std::vector<CudasimRequest>& examples() {
    example_list_.clear();
    for (const auto& [key, request] : examples_) example_list_.push_back(request);
    return example_list_;
  }

 private:
  // The contexts that a warp's lanes have been in: a tree, with a node for each iteration of each
  // loop and for each call. Loops that follow each other share the nodes of their iterations; their
  // instructions differ anyway.
  class Contexts {
   public:
    explicit Contexts(std::uint64_t& open_bytes) : open_bytes_(open_bytes) { clear(); }
    ~Contexts() { open_bytes_ -= nodes_.size() * sizeof(Node); }
    Contexts(const Contexts&) = delete;
    Contexts& operator=(const Contexts&) = delete;

    void clear() {
      open_bytes_ -= nodes_.size() * sizeof(Node);
      if (nodes_.capacity() > kManyEntries) std::vector<Node>().swap(nodes_);
      nodes_.assign(1, {});
      open_bytes_ += sizeof(Node);
    }
    std::size_t size() const { return nodes_.size(); }

    // Forgets all but the first `kept` nodes and those that lead out from `from`, the place of the
    // only lane; returns its new place.
    std::uint32_t forget(std::size_t kept, std::uint32_t from) {
      open_bytes_ -= nodes_.size() * sizeof(Node);
      std::vector<Node> path;  // from the inside
      for (; from >= kept; from = nodes_[from].outer) path.push_back({0, nodes_[from].call});
      for (std::size_t i = 0; i < kept; ++i) {
        Node& node = nodes_[i];
        if (node.next >= kept) node.next = 0;
        if (node.loop >= kept) node.loop = 0;
        while (node.calls >= kept) node.calls = nodes_[node.calls].next;  // the latest is first
      }
      nodes_.resize(kept);
      open_bytes_ += kept * sizeof(Node);
      for (auto node = path.rbegin(); node != path.rend(); ++node) {
        node->outer = from;
        from = add(*node);
      }
      return from;
    }

    std::uint32_t outer(std::uint32_t of) const { return nodes_[of].outer; }
    std::uint32_t enter_loop(std::uint32_t from) {
      if (nodes_[from].loop == 0) nodes_[from].loop = add({from});
      return nodes_[from].loop;
    }
    std::uint32_t next_iteration(std::uint32_t from) {
      if (nodes_[from].next == 0) nodes_[from].next = add({nodes_[from].outer});
      return nodes_[from].next;
    }
    std::uint32_t enter_function(std::uint32_t from, std::uint32_t call) {
      std::uint32_t node = nodes_[from].calls;
      while (node != 0 && nodes_[node].call != call) node = nodes_[node].next;
      if (node != 0) return node;
      node = add({from, call, nodes_[from].calls});
      return nodes_[from].calls = node;
    }

   private:
    struct Node {
      std::uint32_t outer = 0;  // where a lane is after the loop or call
      std::uint32_t call = 0;   // who called
      std::uint32_t next = 0;   // the next iteration, or another call from the same context
      std::uint32_t loop = 0;   // the first of the iterations in this context
      std::uint32_t calls = 0;  // a list of the calls in this context
    };

    std::uint32_t add(const Node& node) {
      nodes_.push_back(node);
      open_bytes_ += sizeof(Node);
      return static_cast<std::uint32_t>(nodes_.size() - 1);
    }

    std::uint64_t& open_bytes_;
    std::vector<Node> nodes_;  // the first is the kernel's own context
  };

  struct Key {
    std::uint32_t context, instruction;
    int buffer;
    std::uint32_t bytes;
    Operation op;

    bool operator==(const Key& other) const {
      return context == other.context && instruction == other.instruction &&
             buffer == other.buffer && bytes == other.bytes && op == other.op;
    }
  };

  // A load, store or atomic of a warp: where each of the lanes in `mask` goes.
  struct Request {
    Key key;
    std::uint32_t mask;
    std::array<std::uint64_t, kLanes> offsets;
  };

  // The requests of a warp since they were last counted.
  class Requests {
   public:
    explicit Requests(std::uint64_t& open_bytes) : open_bytes_(open_bytes) {}
    ~Requests() { open_bytes_ -= list_.size() * sizeof(Request); }
    Requests(const Requests&) = delete;
    Requests& operator=(const Requests&) = delete;

    // `expected` is where the request should be, if this lane does what the last one did.
    void add(const Key& key, int lane, std::uint64_t offset, std::uint32_t& expected) {
      const std::uint32_t bit = 1u << lane;
      if (!is_open(expected, key, bit)) expected = find(key, bit);
      Request& request = list_[expected];
      request.mask |= bit;
      request.offsets[lane] = offset;
      ++expected;
    }
    const std::vector<Request>& list() const { return list_; }
    void clear() {
      open_bytes_ -= list_.size() * sizeof(Request);
      list_.clear();
      if (list_.capacity() > kManyEntries) {
        std::vector<Request>().swap(list_);
        std::vector<Slot>().swap(slots_);
      }
      if (++generation_ == 0) slots_.assign(slots_.size(), {});
    }
    // Forgets all but the first `kept`.
    void forget(std::size_t kept) {
      open_bytes_ -= (list_.size() - kept) * sizeof(Request);
      list_.resize(kept);
      fill(slots_.size());
    }

   private:
    struct Slot {
      std::uint32_t generation = 0, index = 0;
    };

    // Whether the lane can join the request. One that is in it already has come here by a goto.
    bool is_open(std::uint32_t index, const Key& key, std::uint32_t bit) const {
      return index < list_.size() && list_[index].key == key && (list_[index].mask & bit) == 0;
    }

    std::uint32_t find(const Key& key, std::uint32_t bit) {
      if (2 * list_.size() >= slots_.size()) grow();
      std::size_t slot = hash(key);
      for (; slots_[slot].generation == generation_; slot = (slot + 1) % slots_.size()) {
        if (is_open(slots_[slot].index, key, bit)) return slots_[slot].index;
      }
      const auto index = static_cast<std::uint32_t>(list_.size());
      list_.push_back({key, 0, {}});
      open_bytes_ += sizeof(Request);
      slots_[slot] = {generation_, index};
      return index;
    }

    void grow() { fill(std::max<std::size_t>(1024, 2 * slots_.size())); }

    void fill(std::size_t slots) {
      slots_.assign(slots, {});
      generation_ = 1;
      for (std::uint32_t i = 0; i < list_.size(); ++i) {
        std::size_t slot = hash(list_[i].key);
        while (slots_[slot].generation == generation_) slot = (slot + 1) % slots_.size();
        slots_[slot] = {generation_, i};
      }
    }

    std::size_t hash(const Key& key) const {
      const std::uint64_t word = static_cast<std::uint64_t>(key.context) << 32 | key.instruction;
      return static_cast<std::size_t>((word * 0x9E3779B97F4A7C15u) >> 32) % slots_.size();
    }

    std::uint64_t& open_bytes_;
    std::vector<Request> list_;  // in the order in which the first lane made them
    std::vector<Slot> slots_;    // a hash table over it
    std::uint32_t generation_ = 1;
  };

  struct Lane {
    std::uint32_t context = 0;  // where it is now
    std::uint32_t depth = 0;    // in calls
    std::uint32_t next = 0;     // see Requests::add
  };

  struct Warp {
    std::unique_ptr<Requests> requests;
    std::unique_ptr<Contexts> contexts;
    int finished = 0;  // lanes
    // Where only one lane is left: what there was before. It may still join these requests.
    bool has_last_lane = false;
    std::size_t shared_requests = 0, shared_contexts = 0;
  };

  // Who touched a word of shared memory last. Epochs count the barriers.
  struct Word {
    std::uint32_t write_epoch = 0, write_clock = 0, read_epoch = 0, read_clock = 0;
    std::uint32_t block = 0;  // whose `written` mask this is
    std::int16_t writer = -1, reader = -1;
    std::int16_t other_reader = -1;  // of another warp than `reader`, if there are many
    std::uint8_t write_mask = 0, read_mask = 0, written = 0;
    bool many_readers = false;
  };

  // Who wrote a granule of global memory last.
  struct Write {
    std::uint32_t block = 0, epoch = 0, clock = 0;
    std::int32_t thread = -1;
    CudasimIndex index{};
  };

  struct State {
    CudasimBuffer buffer{};
    std::uint64_t start = 0;
    std::vector<bool> touched;         // global: sectors
    std::vector<std::uint32_t> loads;  // global: how often each granule was read
    std::vector<bool> unwritten;       // global: granules that hold nothing yet
    std::vector<Write> writes;         // global: made at the first store
    std::vector<Word> words;           // shared
  };

  static void find_unwritten(State& state) {
    const CudasimBuffer& buffer = state.buffer;
    state.unwritten.resize(buffer.bytes / buffer.granule + 1);
    for (std::uint64_t i = 0; i + buffer.granule <= buffer.bytes; i += buffer.granule) {
      const char* at = reinterpret_cast<const char*>(buffer.start) + i;
      bool nan = false;
      if (buffer.granule == 4) {
        float value;
        std::memcpy(&value, at, 4);
        nan = value != value;
      } else if (buffer.granule == 8) {
        double value;
        std::memcpy(&value, at, 8);
        nan = value != value;
      }
      state.unwritten[i / buffer.granule] = nan;
    }
  }

  int lanes_of(int warp) const { return std::min(kLanes, threads_ - warp * kLanes); }

  int find(std::uint64_t address, std::uint32_t bytes) {
    if (last_found_ >= 0 && holds(last_found_, address, bytes)) return last_found_;
    auto next = by_address_.upper_bound(address);
    if (next == by_address_.begin()) return -1;
    const int index = static_cast<int>(std::prev(next)->second);
    if (!holds(index, address, bytes)) return -1;
    return last_found_ = index;
  }

  bool holds(int index, std::uint64_t address, std::uint32_t bytes) const {
    const State& state = states_[index];
    return address >= state.start && address + bytes <= state.start + state.buffer.bytes;
  }

  int nearest(std::uint64_t address) const {
    int best = -1;
    std::uint64_t best_distance = kReach;  // else it has nothing to do with the buffer
    for (const auto& [start, index] : by_address_) {
      const std::uint64_t end = start + states_[index].buffer.bytes;
      const std::uint64_t distance = address < start ? start - address : address - end;
      if (distance < best_distance) {
        best_distance = distance;
        best = static_cast<int>(index);
      }
    }
    return best;
  }

  // ---- Hazards ----------------------------------------------------------------------------------

  void note(int kind, std::uint64_t pc, int buffer, std::uint64_t address, CudasimIndex other_block,
            CudasimIndex other_thread) {
    const auto key = std::make_tuple(kind, pc, buffer);
    const auto [found, is_new] = hazard_index_.emplace(key, hazards_.size());
    if (!is_new) {
      ++hazards_[found->second].count;
      return;
    }
    const std::uint64_t start = buffer < 0 ? 0 : states_[buffer].start;
    hazards_.push_back({kind, buffer, pc - library_, static_cast<std::int64_t>(address - start), 1,
                        block_, index_, other_block, other_thread});
  }

  void note_divergence(std::uint64_t site, const CudasimIndex& other) {
    note(CUDASIM_DIVERGENT_BARRIER, site, -1, 0, block_, other);
  }

  // Whether what `other` did at `clock` of its warp came before the current thread's present.
  bool is_ordered(int other, std::uint32_t clock) const {
    return other / kLanes == thread_ / kLanes && clock < clocks_[thread_ / kLanes];
  }

  static CudasimIndex unravel(std::uint64_t linear, const CudasimIndex& size) {
    return {static_cast<unsigned>(linear % size.x), static_cast<unsigned>(linear / size.x % size.y),
            static_cast<unsigned>(linear / size.x / size.y)};
  }

  void check_shared(State& state, int index, std::uint64_t pc, std::uint64_t address,
                    std::uint32_t bytes, Operation op) {
    const std::uint32_t clock = clocks_[thread_ / kLanes];
    const std::uint64_t first = address - state.start, last = first + bytes;
    for (std::uint64_t at = first; at < last; at = at / 4 * 4 + 4) {
      Word& word = state.words[at / 4];
      std::uint8_t mask = 0;
      for (std::uint64_t b = at; b < std::min(last, at / 4 * 4 + 4); ++b) mask |= 1u << (b % 4);
      if (word.block != block_serial_) {
        word = {};
        word.block = block_serial_;
      }
      if (op == kLoad && (word.written & mask) != mask) {
        note(CUDASIM_UNINITIALISED_READ, pc, index, state.start + at, {}, {});
      }
      if (op == kAtomic) {  // atomics do not race with each other
        word.written |= mask;
        continue;
      }
      const bool written_now = word.write_epoch == epoch_ && (word.write_mask & mask) != 0 &&
                               word.writer != thread_ && !is_ordered(word.writer, word.write_clock);
      const bool read_now = word.read_epoch == epoch_ && (word.read_mask & mask) != 0 &&
                            (word.many_readers || word.reader != thread_) &&
                            (word.many_readers || !is_ordered(word.reader, word.read_clock));
      if (written_now || (op == kStore && read_now)) {
        const bool own_warp = word.many_readers && word.reader / kLanes == thread_ / kLanes;
        const int reader = own_warp ? word.other_reader : word.reader;
        const int other = written_now ? word.writer : reader;
        note(CUDASIM_RACE, pc, index, state.start + at, block_, unravel(other, block_size_));
      }
      if (op == kStore) {
        const bool same = word.write_epoch == epoch_ && word.writer == thread_;
        word.write_mask = same ? word.write_mask | mask : mask;
        word.write_epoch = epoch_;
        word.write_clock = clock;
        word.writer = static_cast<std::int16_t>(thread_);
        word.written |= mask;
      } else {
        const bool now = word.read_epoch == epoch_;
        const bool by_two_warps = now && word.reader / kLanes != thread_ / kLanes;
        if (by_two_warps) word.other_reader = word.reader;
        word.many_readers = now && (word.many_readers || by_two_warps);
        word.read_mask = now ? word.read_mask | mask : mask;
        word.read_epoch = epoch_;
        word.read_clock = clock;
        if (!now || word.reader != thread_) word.reader = static_cast<std::int16_t>(thread_);
      }
    }
  }

  void check_global(State& state, int index, std::uint64_t pc, std::uint64_t address,
                    std::uint32_t bytes, Operation op) {
    const std::uint32_t granule = state.buffer.granule;
    const std::uint64_t first = address - state.start;
    for (std::uint64_t s = first / kSectorBytes; s <= (first + bytes - 1) / kSectorBytes; ++s) {
      state.touched[s] = true;
    }
    const std::uint32_t clock = clocks_[thread_ / kLanes];
    for (std::uint64_t g = first / granule; g <= (first + bytes - 1) / granule; ++g) {
      if (op != kStore) ++state.loads[g];
      if (!state.unwritten.empty() && state.unwritten[g]) {
        if (op != kStore)
          note(CUDASIM_UNINITIALISED_READ, pc, index, state.start + g * granule, {}, {});
        if (op != kLoad) state.unwritten[g] = false;
      }
      if (op == kAtomic) continue;
      if (!state.writes.empty()) {
        const Write& write = state.writes[g];
        const bool by_other_block = write.block != 0 && write.block != block_number_;
        const bool by_other_thread = write.block == block_number_ && write.thread != thread_ &&
                                     write.epoch == epoch_ &&
                                     !is_ordered(write.thread, write.clock);
        if (by_other_block || by_other_thread) {
          note(op == kStore ? CUDASIM_WRITE_CONFLICT : CUDASIM_RACE, pc, index,
               state.start + g * granule, unravel(write.block - 1, grid_size_), write.index);
        }
      }
      if (op == kStore) {
        if (state.writes.empty()) state.writes.resize(state.buffer.bytes / granule + 1);
        state.writes[g] = {block_number_, epoch_, clock, thread_, index_};
      }
    }
  }

  // ---- Counting requests ------------------------------------------------------------------------

  // One warp after the other uses the same memory, which is still in the cache.
  template <class T>
  std::unique_ptr<T> take(std::vector<std::unique_ptr<T>>& spare) {
    if (spare.empty()) return std::make_unique<T>(open_bytes_);
    std::unique_ptr<T> one = std::move(spare.back());
    spare.pop_back();
    return one;
  }
  template <class T>
  static void give_back(std::unique_ptr<T>& one, std::vector<std::unique_ptr<T>>& spare) {
    one->clear();
    spare.push_back(std::move(one));
  }

  // Counts what the last lane of a warp did alone, once it is much, and forgets it.
  void free_complete() {
    if (!warp_->has_last_lane) return;
    const std::size_t requests = warp_->shared_requests, contexts = warp_->shared_contexts;
    const std::vector<Request>& list = warp_->requests->list();
    if (list.size() < requests + std::max(requests, kManyEntries) &&
        warp_->contexts->size() < contexts + std::max(contexts, kManyEntries)) {
      return;
    }
    for (std::size_t i = requests; i < list.size(); ++i) count_request(list[i]);
    warp_->requests->forget(requests);
    lane_->context = warp_->contexts->forget(contexts, lane_->context);
  }

  void count_requests(Warp& warp) {
    if (warp.requests == nullptr) return;
    for (const Request& request : warp.requests->list()) count_request(request);
    give_back(warp.requests, spare_requests_);
    const auto first = static_cast<std::size_t>(&warp - warps_.data()) * kLanes;
    for (std::size_t i = first; i < std::min(first + kLanes, lanes_.size()); ++i)
      lanes_[i].next = 0;
  }

  void close(Warp& warp) {
    count_requests(warp);
    if (warp.contexts != nullptr) give_back(warp.contexts, spare_contexts_);
    warp.has_last_lane = false;
  }

  void count_request(const Request& request) {
    const auto& [key, mask, offsets] = request;
    const std::uint32_t bytes = key.bytes;
    const State& state = states_[key.buffer];
    std::array<std::uint64_t, kLanes> sorted;
    int lanes = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (mask >> lane & 1) sorted[lanes++] = offsets[lane];
    }
    std::sort(sorted.begin(), sorted.begin() + lanes);
    const auto distinct = static_cast<std::uint64_t>(
        std::unique(sorted.begin(), sorted.begin() + lanes) - sorted.begin());
    const std::uint64_t distinct_bytes = distinct * bytes;

    const auto place = std::make_tuple(key.instruction, key.op, key.buffer);
    CudasimSite& site = sites_[place];
    site.pc = key.instruction;
    site.op = key.op;
    site.buffer = key.buffer;
    ++site.requests;
    site.active_lanes += lanes;
    site.bytes_requested += static_cast<std::uint64_t>(lanes) * bytes;
    std::uint64_t cost;
    if (state.buffer.space == CUDASIM_GLOBAL) {
      cost = 0;
      std::uint64_t last = ~0ull;
      for (std::uint64_t i = 0; i < distinct; ++i) {
        for (std::uint64_t s = sorted[i] / kSectorBytes;
             s <= (sorted[i] + bytes - 1) / kSectorBytes; ++s) {
          if (s != last) ++cost;
          last = s;
        }
      }
      site.bytes_moved += cost * kSectorBytes;
      site.ideal += (distinct_bytes + kSectorBytes - 1) / kSectorBytes;
    } else {
      cost = wavefronts(offsets, mask, bytes);
      site.bytes_moved += cost * kBanks * kBankBytes;
      site.ideal += (distinct_bytes + kBanks * kBankBytes - 1) / (kBanks * kBankBytes);
    }
    site.transactions += cost;
    const auto [example, is_new] = examples_.try_emplace(place);
    if (is_new || cost > example->second.transactions) {
      example->second = {key.instruction, key.op, key.buffer, bytes, mask, cost, {}};
      std::copy(offsets.begin(), offsets.end(), example->second.offsets);
    }
  }

  // Every bank gives one word a wavefront. A wavefront returns a register for each lane, so
  // accesses of 8 bytes go by half warps and those of 16 bytes by quarters: within one of these,
  // lanes that want the same words are served together, but not across them. Quarters go two by two
  // where all lanes want the same as their neighbour (lane ^ 1) or the next but one (lane ^ 2),
  // because the registers are then packed: an NVIDIA engineer's answer at
  // forums.developer.nvidia.com/t/unexpected-shared-memory-bank-conflict/77228, and measured on an
  // H200 (records/nvidia-h200-counters.json).
  static std::uint64_t wavefronts(const std::array<std::uint64_t, kLanes>& offsets,
                                  std::uint32_t mask, std::uint32_t bytes) {
    const bool packed = are_pairs_equal(offsets, mask, 1) || are_pairs_equal(offsets, mask, 2);
    const int group = bytes <= 4 ? 32 : bytes <= 8 || packed ? 16 : 8;
    std::uint64_t total = 0;
    for (int first = 0; first < kLanes; first += group) {
      std::array<std::uint64_t, kLanes * 4> words;
      int count = 0;
      for (int lane = first; lane < first + group; ++lane) {
        if ((mask >> lane & 1) == 0) continue;
        const std::uint64_t offset = offsets[lane];
        for (std::uint64_t w = offset / kBankBytes; w <= (offset + bytes - 1) / kBankBytes; ++w) {
          if (count < static_cast<int>(words.size())) words[count++] = w;
        }
      }
      if (count == 0) continue;
      std::sort(words.begin(), words.begin() + count);
      const auto end = std::unique(words.begin(), words.begin() + count);
      std::array<int, kBanks> load{};
      for (auto word = words.begin(); word != end; ++word) ++load[*word % kBanks];
      total += *std::max_element(load.begin(), load.end());
    }
    return total;
  }

  // Whether each lane that takes part wants what lane ^ `step` wants, if that takes part too.
  static bool are_pairs_equal(const std::array<std::uint64_t, kLanes>& offsets, std::uint32_t mask,
                              int step) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int other = lane ^ step;
      const bool both = (mask >> lane & 1) && (mask >> other & 1);
      if (both && offsets[lane] != offsets[other]) return false;
    }
    return true;
  }

  const CudasimTrace setup_;
  std::uint64_t open_bytes_ = 0;  // of requests and contexts; they count themselves
  std::vector<State> states_;
  std::map<std::uint64_t, std::size_t> by_address_;
  int last_found_ = -1;
  int threads_ = 0;
  std::uintptr_t library_ = 0, library_end_ = 0;

  // The thread that runs, and the block.
  CudasimIndex block_{}, index_{}, grid_size_{}, block_size_{};
  std::uint32_t block_number_ = 0, block_serial_ = 0, epoch_ = 0;
  int thread_ = 0;
  Lane* lane_ = nullptr;  // null outside kernels
  int bit_ = 0;           // of the lane in its warp
  Warp* warp_ = nullptr;
  std::uint64_t stack_ = 0, stack_end_ = 0;
  std::uint64_t arguments_ = 0, arguments_end_ = 0;  // the kernel's, with the launcher
  std::vector<Lane> lanes_;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<Requests>> spare_requests_;
  std::vector<std::unique_ptr<Contexts>> spare_contexts_;
  std::vector<std::uint32_t> clocks_;  // of each warp: its warp-level synchronisations
  std::uint64_t barrier_site_ = 0;     // where threads of the block wait now
  CudasimIndex barrier_index_{}, exited_index_{};
  int exited_ = -1;

  std::uint64_t fma_ = 0, tensor_fma_ = 0, steps_ = 0;
  using Place = std::tuple<std::uint32_t, int, int>;  // instruction, operation, buffer
  std::map<Place, CudasimSite> sites_;
  std::map<Place, CudasimRequest> examples_;
  std::vector<CudasimSite> site_list_;
  std::vector<CudasimRequest> example_list_;
  std::vector<CudasimHazard> hazards_;
  std::map<std::tuple<int, std::uint64_t, int>, std::size_t> hazard_index_;
};

}  // namespace cudasim
