// Stacks, and changing from one to another without the system's help.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <vector>

#if !defined(__x86_64__) && !defined(PDDM_PORTABLE_FIBERS)
#define PDDM_PORTABLE_FIBERS
#endif
#if defined(PDDM_PORTABLE_FIBERS)
#include <setjmp.h>
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)  // wants to know whose stack it is
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace pddm::emulation {

constexpr size_t kStackBytes = 128 << 10;
const size_t kPage = size_t(sysconf(_SC_PAGESIZE));  // up to 64 KiB on Arm

// Each stack ends at a page that faults. They live as long as the host thread.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  ~Stacks() {
    for (unsigned char* stack : stacks_) munmap(stack, kPage + kStackBytes);
  }
  unsigned char* operator[](size_t index) {
    while (stacks_.size() <= index) {
      void* memory = mmap(nullptr, kPage + kStackBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      stacks_.push_back(static_cast<unsigned char*>(memory));
      if (mprotect(stacks_.back() + kPage, kStackBytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    }
    return stacks_[index] + kPage;
  }

 private:
  std::vector<unsigned char*> stacks_;
};

#if !defined(PDDM_PORTABLE_FIBERS)
// Pushes what a call must preserve, leaves the stack pointer in *from, and returns on the stack `to`.
extern "C" __attribute__((visibility("hidden"))) void pddm_emulation_switch(void** from, void* to);
#endif

class Fiber {
 public:
#if defined(__SANITIZE_ADDRESS__)
  Fiber() {  // the host thread's own
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom_, &bytes_);
    pthread_attr_destroy(&attributes);
  }
#endif
  // The first switch calls `entry`, which must not return.
  void start(unsigned char* stack, unsigned color, void (*entry)()) {
    // Stacks are whole pages apart; were all tops at the same place, they would share a few lines of the cache.
    unsigned char* const top = stack + kStackBytes - color % 16 * 256;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStackBytes);
    bottom_ = stack, bytes_ = kStackBytes;
#endif
#if defined(PDDM_PORTABLE_FIBERS)
    getcontext(&begin_);
    begin_.uc_stack.ss_sp = stack, begin_.uc_stack.ss_size = size_t(top - stack), begin_.uc_link = nullptr;
    makecontext(&begin_, entry, 0);
    begun_ = false;
#else
    void** const words = reinterpret_cast<void**>(top);
    for (int w = 1; w <= 8; ++w) words[-w] = nullptr;  // six registers, and nowhere to return to
    words[-2] = reinterpret_cast<void*>(entry);
    pointer_ = words - 8;
#endif
  }

  // At the beginning of `entry`.
  static void entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  }

  // `leaving`: nobody comes back.
  static void change(Fiber& from, Fiber& to, bool leaving = false) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(leaving ? nullptr : &fake, to.bottom_, to.bytes_);
#else
    (void)leaving;
#endif
#if defined(PDDM_PORTABLE_FIBERS)
    if (_setjmp(from.here_) == 0) {
      if (to.begun_) _longjmp(to.here_, 1);
      to.begun_ = true;
      setcontext(&to.begin_);
    }
#else
    pddm_emulation_switch(&from.pointer_, to.pointer_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  void* bottom_;
  size_t bytes_;
#endif
#if defined(PDDM_PORTABLE_FIBERS)
  jmp_buf here_;
  ucontext_t begin_;
  bool begun_ = true;
#else
  void* pointer_ = nullptr;
#endif
};

}  // namespace pddm::emulation
