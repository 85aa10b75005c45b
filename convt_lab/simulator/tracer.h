// Counts what a warp does, and looks for hazards, in a launch of an instrumented kernel.
//
// The kernel is compiled with GCC's -fsanitize=thread (a call before every load and store, with its
// address) and -fsanitize-coverage=trace-pc (a call at the start of every basic block). Neither
// sanitizer's library is linked: the calls end here, and the kernel's source is untouched.
//
// A block's threads run one after the other, so what the 32 lanes of a warp would do together has
// to be put together afterwards. Each thread records its path: basic blocks, accesses, calls and
// returns. The paths of a warp are then walked in step. Among the lanes' next events the one
// deepest in calls goes first, and among those the one that stands first in the code; the lanes
// that are at the very same place take part. Lanes that left a loop early so wait for the others
// behind it, as on a GPU.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "runtime.h"

namespace cudasim {

constexpr int kLanes = 32;
constexpr int kSectorBytes = 32;
constexpr int kBanks = 32;
constexpr int kBankBytes = 4;

enum Operation : std::uint8_t { kMarker, kLoad, kStore, kAtomic };

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
    paths_.assign(threads_, {});
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
      if (state.buffer.space != CUDASIM_GLOBAL) state.words.assign(state.buffer.bytes / 4 + 2, {});
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
    for (Path& path : paths_) {
      path.callers.clear();
      path.stack = path.depth = 0;
    }
    barrier_site_ = 0;
    exited_ = -1;
  }

  void run_thread(int thread, const CudasimIndex& index, const char* stack, std::size_t bytes) {
    thread_ = thread;
    index_ = index;
    path_ = &paths_[thread];
    if (path_->events.capacity() == 0 && !spare_.empty()) {
      path_->events = std::move(spare_.back());
      spare_.pop_back();
    }
    stack_ = reinterpret_cast<std::uint64_t>(stack);
    stack_end_ = stack_ + bytes;
  }

  void stop() { path_ = nullptr; }

  void arrive_at_barrier(std::uint64_t site) {
    if (barrier_site_ == 0) {
      barrier_site_ = site;
      barrier_index_ = index_;
      if (exited_ >= 0) note_divergence(site);
    } else if (site != barrier_site_) {
      note_divergence(site);
    }
  }

  void finish_thread() {
    path_ = nullptr;
    exited_ = thread_;
    exited_index_ = index_;
    if (barrier_site_ != 0) note_divergence(barrier_site_);
    const int warp = thread_ / kLanes;
    if (++finished_[warp] == lanes_of(warp)) merge(warp);
  }

  // All waiting threads of the block go on; nothing before orders after.
  void release_barrier() {
    merge_all();
    ++epoch_;
    barrier_site_ = 0;
  }

  void release_warp(int warp) {
    merge(warp);
    ++clocks_[warp];
  }

  void end_block() {
    merge_all();
    finished_.clear();
  }

  // ---- What the instrumented kernel reports ---------------------------------------------------

  // Returns false when the thread has taken more steps than it may.
  bool enter_basic_block(std::uint64_t pc) {
    if (path_ == nullptr) return true;
    add(pc, 0);
    return ++steps_ <= setup_.max_steps;
  }

  void enter_function(std::uint64_t caller) {
    if (path_ == nullptr) return;
    path_->callers.push_back(path_->stack);
    const auto key = std::make_pair(path_->stack, static_cast<std::uint32_t>(caller - library_));
    path_->stack =
        stacks_.emplace(key, static_cast<std::uint32_t>(stacks_.size() + 1)).first->second;
    ++path_->depth;
  }

  void leave_function() {
    if (path_ == nullptr || path_->callers.empty()) return;
    path_->stack = path_->callers.back();
    path_->callers.pop_back();
    --path_->depth;
  }

  void count_fma() { fma_ += path_ != nullptr; }

  // Returns why the launch must end, or null.
  const char* access(std::uint64_t pc, std::uint64_t address, std::uint32_t bytes, Operation op) {
    if (path_ == nullptr) return nullptr;
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
    add(pc, Event::what_of(op, std::min(bytes, 63u), index, address - state.start));
    return nullptr;
  }

  // ---- Results ----------------------------------------------------------------------------------

  std::uint64_t fma() const { return fma_; }
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
  // What a lane did, in two words. Events are taken in the order of `place`: deepest in calls
  // first, then by which calls led here, then by address of the code.
  struct Event {
    std::uint64_t place;
    std::uint64_t what;  // 0 for a basic block

    static std::uint64_t place_of(std::uint32_t depth, std::uint32_t stack, std::uint32_t pc) {
      return static_cast<std::uint64_t>(255 - std::min(depth, 255u)) << 56 |
             static_cast<std::uint64_t>(stack & 0xFFFFFF) << 32 | pc;
    }
    static std::uint64_t what_of(Operation op, std::uint32_t bytes, int buffer,
                                 std::uint64_t offset) {
      return static_cast<std::uint64_t>(op) << 62 | static_cast<std::uint64_t>(bytes) << 56 |
             static_cast<std::uint64_t>(buffer) << 40 | offset;
    }
    std::uint32_t pc() const { return static_cast<std::uint32_t>(place); }
    Operation op() const { return static_cast<Operation>(what >> 62); }
    std::uint32_t bytes() const { return what >> 56 & 0x3F; }
    int buffer() const { return what >> 40 & 0xFFFF; }
    std::uint64_t offset() const { return what & ((std::uint64_t{1} << 40) - 1); }
  };

  struct Path {
    std::vector<Event> events;
    std::vector<std::uint32_t> callers;
    std::uint32_t stack = 0;
    std::uint16_t depth = 0;
  };

  // Who touched a word of shared memory last. Epochs count the barriers.
  struct Word {
    std::uint32_t write_epoch = 0, write_clock = 0, read_epoch = 0, read_clock = 0;
    std::uint32_t block = 0;  // whose `written` mask this is
    std::int16_t writer = -1, reader = -1;
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

  void add(std::uint64_t pc, std::uint64_t what) {
    const auto relative = static_cast<std::uint32_t>(pc - library_);
    path_->events.push_back({Event::place_of(path_->depth, path_->stack, relative), what});
  }

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
    std::uint64_t best_distance = ~0ull;
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

  void note_divergence(std::uint64_t site) {
    note(CUDASIM_DIVERGENT_BARRIER, site, -1, 0, block_,
         exited_ >= 0 ? exited_index_ : barrier_index_);
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
        const int other = written_now ? word.writer : word.reader;
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
        word.many_readers = now && (word.many_readers || word.reader / kLanes != thread_ / kLanes);
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

  // ---- Walking a warp's paths in step -----------------------------------------------------------

  void merge_all() {
    for (std::size_t warp = 0; warp < clocks_.size(); ++warp) merge(static_cast<int>(warp));
  }

  void merge(int warp) {
    constexpr std::uint64_t kDone = ~std::uint64_t{0};
    std::array<const Event*, kLanes> next{}, end{};
    std::array<std::uint64_t, kLanes> place;  // of each lane's next event
    place.fill(kDone);
    const int lanes = lanes_of(warp);
    for (int lane = 0; lane < lanes; ++lane) {
      const auto& events = paths_[warp * kLanes + lane].events;
      next[lane] = events.data();
      end[lane] = events.data() + events.size();
      if (next[lane] != end[lane]) place[lane] = next[lane]->place;
    }
    for (;;) {
      std::uint64_t first = kDone;
      for (const std::uint64_t p : place) first = std::min(first, p);
      if (first == kDone) break;
      std::array<std::uint64_t, kLanes> offsets;
      std::uint32_t mask = 0;
      const Event* leader = nullptr;
      for (int lane = 0; lane < kLanes; ++lane) {
        if (place[lane] != first) continue;
        leader = next[lane]++;
        offsets[lane] = leader->offset();
        mask |= 1u << lane;
        place[lane] = next[lane] == end[lane] ? kDone : next[lane]->place;
      }
      if (leader->op() != kMarker) count_request(*leader, offsets, mask);
    }
    // The next warp records into the same memory, which is still in the cache.
    for (int lane = 0; lane < lanes; ++lane) {
      auto& events = paths_[warp * kLanes + lane].events;
      events.clear();
      if (events.capacity() > 0) spare_.push_back(std::move(events));
      events = {};
    }
  }

  void count_request(const Event& event, const std::array<std::uint64_t, kLanes>& offsets,
                     std::uint32_t mask) {
    const std::uint32_t bytes = event.bytes();
    const State& state = states_[event.buffer()];
    std::array<std::uint64_t, kLanes> sorted;
    int lanes = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (mask >> lane & 1) sorted[lanes++] = offsets[lane];
    }
    std::sort(sorted.begin(), sorted.begin() + lanes);
    const auto distinct = static_cast<std::uint64_t>(
        std::unique(sorted.begin(), sorted.begin() + lanes) - sorted.begin());
    const std::uint64_t distinct_bytes = distinct * bytes;

    const std::uint64_t key = (static_cast<std::uint64_t>(event.pc()) << 24) |
                              (static_cast<std::uint64_t>(event.op()) << 16) |
                              static_cast<std::uint16_t>(event.buffer());
    CudasimSite& site = sites_[key];
    site.pc = event.pc();
    site.op = event.op();
    site.buffer = event.buffer();
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
    const auto [example, is_new] = examples_.try_emplace(key);
    if (is_new || cost > example->second.transactions) {
      CudasimRequest& request = example->second;
      request = {event.pc(), event.op(), event.buffer(), bytes, mask, cost, {}};
      for (int lane = 0; lane < kLanes; ++lane) {
        request.offsets[lane] = mask >> lane & 1 ? offsets[lane] : 0;
      }
    }
  }

  // Every bank gives one word a wavefront. Accesses of 8 and 16 bytes go by half warps: within a
  // half, lanes that want the same words are served together, but not across the halves (measured
  // on an H200: a float4 that all lanes read takes two wavefronts;
  // records/nvidia-h200-counters.json).
  static std::uint64_t wavefronts(const std::array<std::uint64_t, kLanes>& offsets,
                                  std::uint32_t mask, std::uint32_t bytes) {
    const int group = bytes <= 4 ? 32 : 16;
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

  const CudasimTrace setup_;
  std::vector<State> states_;
  std::map<std::uint64_t, std::size_t> by_address_;
  int last_found_ = -1;
  int threads_ = 0;
  std::uintptr_t library_ = 0, library_end_ = 0;

  // The thread that runs, and the block.
  CudasimIndex block_{}, index_{}, grid_size_{}, block_size_{};
  std::uint32_t block_number_ = 0, block_serial_ = 0, epoch_ = 0;
  int thread_ = 0;
  Path* path_ = nullptr;
  std::uint64_t stack_ = 0, stack_end_ = 0;
  std::uint64_t arguments_ = 0, arguments_end_ = 0;  // the kernel's, with the launcher
  std::vector<Path> paths_;
  std::vector<std::vector<Event>> spare_;  // empty, with room
  std::vector<std::uint32_t> clocks_;      // of each warp: its warp-level synchronisations
  std::unordered_map<int, int> finished_;  // threads done, by warp
  std::uint64_t barrier_site_ = 0;         // where threads of the block wait now
  CudasimIndex barrier_index_{}, exited_index_{};
  int exited_ = -1;
  std::map<std::pair<std::uint32_t, std::uint32_t>, std::uint32_t> stacks_;

  std::uint64_t fma_ = 0, steps_ = 0;
  std::map<std::uint64_t, CudasimSite> sites_;
  std::map<std::uint64_t, CudasimRequest> examples_;
  std::vector<CudasimSite> site_list_;
  std::vector<CudasimRequest> example_list_;
  std::vector<CudasimHazard> hazards_;
  std::map<std::tuple<int, std::uint64_t, int>, std::size_t> hazard_index_;
};

}  // namespace cudasim
