// Runs the blocks of a grid one after another, and the threads of a block as fibers.
//
// What CUDA leaves open is drawn at random, though the same in every run: the order of the blocks,
// and which of the threads able to go on does so next. Threads take turns only where they meet: at
// a barrier, a shuffle or a vote. Whatever lies between two meetings is atomic therefore, and a
// thread that spins until another one acts never ends. ThreadSanitizer sees the threads as they
// would be on a GPU, though: see races.h.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fiber.h"
#include "races.h"

namespace emulator {

constexpr unsigned kWarpSize = 32;
constexpr std::uint64_t kWholeBlock = ~std::uint64_t{0};  // Where a warp's mask would stand.

struct Index {
  unsigned x, y, z;

  std::size_t volume() const { return std::size_t{x} * y * z; }
  Index at(std::size_t rank) const {
    return {unsigned(rank % x), unsigned(rank / x % y), unsigned(rank / x / y)};
  }
};

// So many blocks have fibers of their own where races are looked for; the sanitizer would take what
// two blocks do on the same ones for one thread's. More take longer.
constexpr std::size_t kBlocksWatched = 4;

class Grid {
 public:
  // What a thread takes away from a meeting.
  struct Outcome {
    std::uint64_t value;  // What the lane it asked has brought.
    unsigned votes;       // By lane: has anyone there brought something other than zero?
  };

  // Bytes that a launch's threads moved through load_global and store_global.
  struct Traffic {
    std::uint64_t loaded, stored;
  };

  // Where the running thread is.
  Index grid_size{}, block_size{}, block{}, thread{};
  unsigned lane() const { return current_->rank % kWarpSize; }

  EMULATOR_UNSEEN void count_load(std::size_t bytes) { traffic_->loaded += bytes; }
  EMULATOR_UNSEEN void count_store(std::size_t bytes) { traffic_->stored += bytes; }
  std::uint64_t launches() {
    const std::lock_guard lock(mutex_);
    return launches_.size();
  }
  Traffic traffic(std::uint64_t launch) {
    const std::lock_guard lock(mutex_);
    return launches_.at(launch);
  }
  void forget_launches() {
    const std::lock_guard lock(mutex_);
    launches_.clear();
  }

  void seed(unsigned value) {
    const std::lock_guard lock(mutex_);
    seed_ = value;
  }

  // Calls the kernel once per thread. The first exception thrown in a thread ends the launch.
  void run(Index blocks, Index threads, std::function<void()> kernel) {
    const std::lock_guard lock(mutex_);
    const races::Unseen unseen;
    launches_.push_back({});
    traffic_ = &launches_.back();
    random_.seed(seed_);  // Anew, so that no launch depends on those before it.
    kernel_ = std::move(kernel);
    grid_size = blocks;
    block_size = threads;
    size_ = unsigned(threads.volume());
    std::vector<Index> left;
    for (std::size_t rank = 0; rank < blocks.volume(); ++rank) left.push_back(blocks.at(rank));
    const std::size_t at_once = races::kWatched ? std::min(left.size(), kBlocksWatched) : 1;
    while (threads_.size() < size_ * at_once) threads_.push_back(std::make_unique<Thread>(*this));
    const Span span(*this);
    while (!left.empty()) {
      block = draw(left);
      run_block(left.size() % at_once * size_);
    }
  }

  void fence() {
    const races::Unseen unseen;
    races::release(fences_);
    if (met_an_atomic_) races::acquire(fences_);
  }
  void meet_an_atomic() { met_an_atomic_ = true; }

  // Holds the running thread until all who are invited are in the same meeting: the whole block, or
  // those lanes of the thread's warp that the mask names (a partial warp lacks some of them).
  Outcome meet(std::string_view name, std::uint64_t mask, std::uint64_t value = 0,
               int asked_lane = -1) {
    const races::Unseen unseen;
    Thread& self = *current_;
    const bool orders = name.substr(0, 6) == "__sync";  // As CUDA calls what orders accesses.
    const bool whole = mask == kWholeBlock;
    const unsigned warp = self.rank - lane();
    const unsigned first = whole ? 0 : warp;
    const unsigned last = whole ? size_ : std::min(size_, warp + kWarpSize);
    const auto invited = [=](unsigned rank) {
      return rank < last && (mask >> rank % kWarpSize & 1) != 0;
    };
    self.meeting = {name, mask};
    self.value = value;
    self.asked = asked_lane < 0 ? self.rank : warp + unsigned(asked_lane);
    if (!invited(self.rank)) throw error(describe(self.rank, self.rank) + ", which leaves it out");
    if (!invited(self.asked)) {
      throw error(describe(self.rank, self.rank) + ", asking a lane that is not there");
    }

    races::Place* before = nullptr;  // Of the first who is invited: no other meeting has it now.
    if (orders) {
      const unsigned lowest = whole ? 0 : unsigned(__builtin_ctzll(mask));
      before = &of_rank(first + lowest).before[whole];
      races::release(*before);
    }
    for (unsigned rank = first; rank < last; ++rank) {
      if (!invited(rank) || of_rank(rank).meeting == self.meeting) continue;
      self.suspend();  // Someone is missing. Whoever comes last does the rest for all.
      if (cancelled_) throw Cancelled();
      if (orders) races::acquire(self.last_to_come->after);
      return self.outcome;
    }
    if (orders) {
      races::acquire(*before);
      races::release(self.after);
    }
    unsigned votes = 0;
    for (unsigned rank = first; rank < last; ++rank) {
      if (invited(rank) && of_rank(rank).value != 0) votes |= 1u << rank % kWarpSize;
    }
    for (unsigned rank = first; rank < last; ++rank) {
      if (!invited(rank)) continue;
      Thread& member = of_rank(rank);
      member.outcome = {of_rank(member.asked).value, votes};
      member.last_to_come = &self;
      member.meeting = {};
      if (&member != &self) ready_.push_back(&member);
    }
    return self.outcome;
  }

 private:
  struct Meeting {
    std::string_view name;  // Empty: in no meeting.
    std::uint64_t mask = 0;

    bool operator==(const Meeting& other) const { return mask == other.mask && name == other.name; }
  };

  struct Thread final : Fiber {
    explicit Thread(Grid& its_grid) : grid(its_grid) {}
    void run() noexcept override { grid.run_thread(); }

    Grid& grid;
    unsigned rank = 0;  // In the block.
    Index index{};
    Meeting meeting;
    std::uint64_t value = 0;  // What it brings to the meeting.
    unsigned asked = 0;       // Whose value it wants.
    Outcome outcome{};
    Thread* last_to_come = nullptr;  // To the meeting that it was in.
    races::Place before[2];          // A meeting of its warp, or of the whole block.
    races::Place after;              // A meeting that it was the last to come to.
  };

  // A launch, from its first thread's start to its last one's end.
  struct Span {
    explicit Span(Grid& its_grid) : grid(its_grid) { races::release(grid.start_); }
    Span(const Span&) = delete;
    Span& operator=(const Span&) = delete;
    ~Span() { races::acquire(grid.end_); }

    Grid& grid;
  };

  struct Cancelled {};  // Unwinds the threads that still wait when the launch has failed.

  // On the fibers from the first on.
  void run_block(std::size_t first) {
    first_ = first;
    met_an_atomic_ = false;
    races::renew_shared_memory();
    ready_.clear();
    for (unsigned rank = 0; rank < size_; ++rank) {
      Thread& next = of_rank(rank);
      next.rank = rank;
      next.index = block_size.at(rank);
      next.meeting = {};
      ready_.push_back(&next);
    }
    while (!ready_.empty() && error_ == nullptr) resume(*draw(ready_));

    cancelled_ = true;
    for (unsigned rank = 0; rank < size_; ++rank) {
      if (of_rank(rank).idle()) continue;
      if (error_ == nullptr) error_ = std::make_exception_ptr(error(describe_all()));
      resume(of_rank(rank));
    }
    cancelled_ = false;
    if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  void resume(Thread& next) {
    current_ = &next;
    thread = next.index;
    next.resume();
  }

  void run_thread() {
    races::acquire(start_);
    try {
      kernel_();
    } catch (const Cancelled&) {
    } catch (...) {
      error_ = std::current_exception();
    }
    races::release(end_);
  }

  Thread& of_rank(unsigned rank) const { return *threads_[first_ + rank]; }

  template <class T>
  T draw(std::vector<T>& bag) {
    std::swap(bag[random_() % bag.size()], bag.back());
    const T drawn = bag.back();
    bag.pop_back();
    return drawn;
  }

  std::runtime_error error(const std::string& what) const {
    return std::runtime_error("block (" + std::to_string(block.x) + ", " + std::to_string(block.y) +
                              ", " + std::to_string(block.z) + "): " + what);
  }

  std::string state(unsigned rank) const {
    const Thread& it = of_rank(rank);
    if (it.idle()) return "exited";
    char mask[32] = "";
    if (it.meeting.mask != kWholeBlock) {
      std::snprintf(mask, sizeof mask, " with mask 0x%08x", unsigned(it.meeting.mask));
    }
    return "in " + std::string(it.meeting.name) + mask;
  }

  std::string describe(unsigned first, unsigned last) const {
    const std::string threads =
        first == last ? std::to_string(first) : std::to_string(first) + "-" + std::to_string(last);
    return (first == last ? "thread " : "threads ") + threads + " " + state(first);
  }

  // All threads, neighbors in the same state taken together.
  std::string describe_all() const {
    std::string text = "no thread can go on";
    for (unsigned first = 0, next = 0; first < size_; first = next) {
      while (next < size_ && state(next) == state(first)) ++next;
      text += (first == 0 ? ": " : "; ") + describe(first, next - 1);
    }
    return text;
  }

  std::mutex mutex_;               // Held by a launch: there is one device.
  std::vector<Traffic> launches_;  // What each one moved, since forget_launches().
  Traffic* traffic_ = nullptr;     // The running one's.
  unsigned seed_ = 1;
  std::mt19937 random_;
  std::function<void()> kernel_;
  std::vector<std::unique_ptr<Thread>> threads_;  // As many as any launch has needed.
  std::size_t first_ = 0;                         // The running block's.
  unsigned size_ = 0;                             // As many as it has.
  std::vector<Thread*> ready_;
  Thread* current_ = nullptr;
  std::exception_ptr error_;
  bool cancelled_ = false;
  bool met_an_atomic_ = false;  // The running block.
  races::Place start_, end_, fences_;
};

inline Grid grid;

}  // namespace emulator
