#pragma once
#include <cstddef>

namespace tpla {

// Source rows are asked for twice: into the second-level cache about kRowsAheadBytes before they are due, where many requests can wait, and
// into the first just before. Hardware prefetch stops at 4 KiB pages; with either alone a core moves a tenth less. One line is asked for with
// each line that is moved: a whole row at once fills the core's line buffers and stalls it.
inline constexpr size_t kRowsAheadBytes = 5 * 1024;
inline constexpr size_t kLineAheadBytes = 768;

// A streamed store cannot be asked for ahead, and waits for its page's translation. Touching one line of each page that is written next has it
// looked up meanwhile: with pieces of 18 KB a twentieth of a put.
inline void translate_soon(const std::byte* at, size_t bytes) {
  constexpr size_t kPage = 4096;
  for (size_t offset = 0; offset < bytes; offset += kPage) __builtin_prefetch(at + offset, 0, 0);
}

}  // namespace tpla
