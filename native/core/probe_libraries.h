#pragma once
#include <string>
#include <vector>

namespace tpla {

struct LibraryProbe {
  std::string name;
  // File it was loaded from ("kernel" for a system call); empty where it was not found.
  std::string path;
  // What it is good for, or why it is not there.
  std::string detail;
};

// Tries every optional library once, and closes it again; but for UCX and NIXL, which would stay and stand in the way of another installation.
std::vector<LibraryProbe> probe_libraries();

}  // namespace tpla
