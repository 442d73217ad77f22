#include "storage/cufile.h"

#include <cerrno>
#include <cstring>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/types.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "core/error.h"

namespace tpla {

namespace {

// The few entry points of cuFile's stable C interface that blocks need, declared here so that its header is not.
struct Status {
  int32_t error;   // CUfileOpError, 0 or from 5001 on
  int32_t driver;  // CUresult
};
static_assert(sizeof(Status) == 8);

struct Descriptor {
  int32_t type = 1;  // a Linux file descriptor
  union {
    void* handle = nullptr;
    int fd;
  };
  const void* filesystem_calls = nullptr;
};
static_assert(sizeof(Descriptor) == 24);

// What cuFileDriverGetProperties fills; newer releases may add fields behind.
struct Properties {
  uint32_t major;  // of nvidia-fs; 0.0 where it is not loaded
  uint32_t minor;
  size_t poll_threshold;
  size_t max_direct_io;
  uint32_t filesystems;  // a bit each, below
  uint32_t controls;
  uint32_t features;  // a bit each, below
  uint32_t max_device_cache;
  uint32_t per_buffer_cache;
  uint32_t max_pinned;
  uint32_t max_batch;
  uint32_t batch_timeout;
  std::byte later[200];
};
static_assert(sizeof(Properties) == 256 && offsetof(Properties, filesystems) == 24 && offsetof(Properties, features) == 32);

constexpr const char* kUdevData = "/run/udev/data";

constexpr uint32_t kLustre = 1u << 0;
constexpr uint32_t kWeka = 1u << 1;
constexpr uint32_t kNfs = 1u << 2;
constexpr uint32_t kGpfs = 1u << 3;
constexpr uint32_t kNvme = 1u << 4;
constexpr uint32_t kNvmeOf = 1u << 5;
constexpr uint32_t kScsi = 1u << 6;
constexpr uint32_t kBeeGfs = 1u << 9;
constexpr uint32_t kP2pFeature = 1u << 4;

// Which of those bits stand for the filesystem of a file, by its magic number (statfs(2)); 0 for one that cuFile does not know.
uint32_t filesystem_bits(int fd) {
  struct statfs found;
  if (fstatfs(fd, &found) != 0) return 0;
  switch (static_cast<uint32_t>(found.f_type)) {
    case 0xef53:      // ext4
    case 0x58465342:  // XFS
      return kNvme | kNvmeOf | kScsi;
    case 0x6969: return kNfs;
    case 0x0bd00bd0: return kLustre;
    case 0x19830326: return kBeeGfs;
    case 0x47504653: return kGpfs;
    case 0x19120223: return kWeka;
    default: return 0;
  }
}

}  // namespace

struct CuFile::Calls {
  explicit Calls(const DynamicLibrary& library)
      : driver_open(library.symbol<Status()>("cuFileDriverOpen")),
        properties(library.symbol<Status(Properties*)>("cuFileDriverGetProperties")),
        version(library.symbol<Status(int*)>("cuFileGetVersion")),
        error_text(library.symbol<const char*(int)>("cuFileGetOpErrorString")),
        register_handle(library.symbol<Status(void**, Descriptor*)>("cuFileHandleRegister")),
        deregister_handle(library.symbol<void(void*)>("cuFileHandleDeregister")),
        register_memory(library.symbol<Status(const void*, size_t, int)>("cuFileBufRegister")),
        deregister_memory(library.symbol<Status(const void*)>("cuFileBufDeregister")),
        read(library.symbol<ssize_t(void*, void*, size_t, off_t, off_t)>("cuFileRead")),
        write(library.symbol<ssize_t(void*, const void*, size_t, off_t, off_t)>("cuFileWrite")) {}

  bool is_complete() const {
    return driver_open && properties && register_handle && deregister_handle && register_memory && deregister_memory && read && write;
  }

  Status (*driver_open)();
  Status (*properties)(Properties*);
  Status (*version)(int*);                 // of newer libraries only
  const char* (*error_text)(int);          // likewise
  Status (*register_handle)(void**, Descriptor*);
  void (*deregister_handle)(void*);
  Status (*register_memory)(const void*, size_t, int);
  Status (*deregister_memory)(const void*);
  ssize_t (*read)(void*, void*, size_t, off_t, off_t);
  ssize_t (*write)(void*, const void*, size_t, off_t, off_t);
};

const CuFile& CuFile::shared() {
  struct Opened {
    std::unique_ptr<const CuFile> library;
    std::string reason;
  };
  // Never destroyed: its threads run until the process ends.
  static const Opened* opened = [] {
    auto* result = new Opened();
    try {
      result->library.reset(new CuFile());
    } catch (const Error& error) {
      result->reason = error.what();
    }
    return result;
  }();
  if (!opened->library) throw Error("REQUEST_INVALID", opened->reason);
  return *opened->library;
}

CuFile::CuFile() : library_({"libcufile.so.0", "libcufile.so", "/usr/local/cuda/lib64/libcufile.so.0"}) {
  if (!library_) throw Error("REQUEST_INVALID", "cuFile is not installed: " + library_.error());
  calls_ = std::make_shared<const Calls>(library_);
  if (!calls_->is_complete()) throw Error("REQUEST_INVALID", library_.path() + " lacks functions of cuFile");
  const Status opened = calls_->driver_open();
  check(opened.error, opened.driver, "does not start");
  int version = 0;
  if (calls_->version != nullptr && calls_->version(&version).error == 0) version_ = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  Properties properties{};
  const Status asked = calls_->properties(&properties);
  check(asked.error, asked.driver, "does not tell its properties");
  has_driver_ = properties.major != 0 || properties.minor != 0;
  has_p2p_ = (properties.features & kP2pFeature) != 0 && (properties.filesystems & kNvme) != 0;
  if (has_driver_) nvidia_fs_ = std::to_string(properties.major) + "." + std::to_string(properties.minor);
  filesystems_ = properties.filesystems;
}

std::string CuFile::describe() const {
  const std::string name = version_.empty() ? "cuFile" : "cuFile " + version_;
  if (has_driver_) return name + ", GPUDirect Storage by nvidia-fs " + nvidia_fs_;
  if (has_p2p_) return name + ", GPUDirect Storage by the kernel's peer-to-peer DMA";
  return name + ", compatibility mode: nvidia-fs is not loaded";
}

bool CuFile::reaches(int fd) const { return has_gds() && (filesystem_bits(fd) & filesystems_) != 0; }

void CuFile::check(int32_t status, int32_t driver_status, const std::string& what) const {
  if (status == 0) return;
  throw Error("REQUEST_INVALID", "cuFile " + what + ": " + explain(status) + (driver_status == 0 ? "" : ", CUDA driver error " + std::to_string(driver_status)));
}

std::string CuFile::explain(int64_t status) const {
  const char* text = calls_->error_text == nullptr ? nullptr : calls_->error_text(static_cast<int>(status));
  return (text == nullptr ? std::string("cuFile error") : std::string(text)) + " (" + std::to_string(status) + ")";
}

namespace {

// cuFile asks udev for the disk behind a file even where it goes through host memory: what of that is not there, and what to do; empty where all is.
std::string missing_disk(int fd) {
  struct stat file{};
  if (fstat(fd, &file) != 0) return "";
  if (major(file.st_dev) == 0) return "; its filesystem has no disk of its own (an overlay or a tmpfs, say): take a directory on ext4 or XFS of a local disk";
  const std::string record = std::string(kUdevData) + "/b" + std::to_string(major(file.st_dev)) + ":" + std::to_string(minor(file.st_dev));
  return access(record.c_str(), R_OK) == 0 ? "" : "; it wants udev's record of the disk, " + record + ", which is not there (a container gets it by --volume /run/udev:/run/udev:ro)";
}

}  // namespace

CuFileHandle::CuFileHandle(int fd) : library_(CuFile::shared()) {
  Descriptor descriptor;
  descriptor.fd = fd;
  const Status status = library_.calls_->register_handle(&handle_, &descriptor);
  if (status.error != 0) throw Error("REQUEST_INVALID", "cuFile does not take the file: " + library_.explain(status.error) + missing_disk(fd));
  is_gds_ = library_.reaches(fd);
}

CuFileHandle::~CuFileHandle() {
  if (handle_ != nullptr) library_.calls_->deregister_handle(handle_);
}

bool CuFileHandle::read(std::byte* to, size_t bytes, uint64_t offset) const {
  for (size_t done = 0; done < bytes;) {
    const ssize_t got = library_.calls_->read(handle_, to, bytes - done, static_cast<off_t>(offset + done), static_cast<off_t>(done));
    if (got < 0) throw Error("IO_FAILED", "reading failed: " + (got == -1 ? std::string(std::strerror(errno)) : library_.explain(-got)));
    if (got == 0) return false;
    done += static_cast<size_t>(got);
  }
  return true;
}

void CuFileHandle::write(const std::byte* from, size_t bytes, uint64_t offset) const {
  for (size_t done = 0; done < bytes;) {
    const ssize_t put = library_.calls_->write(handle_, from, bytes - done, static_cast<off_t>(offset + done), static_cast<off_t>(done));
    if (put < -1) throw Error("IO_FAILED", "writing failed: " + library_.explain(-put));
    if (put <= 0) throw Error("IO_FAILED", std::string("writing failed: ") + std::strerror(put < 0 ? errno : ENOSPC));
    done += static_cast<size_t>(put);
  }
}

namespace {

class CuFileIo : public FileIo {
 public:
  explicit CuFileIo(std::shared_ptr<const CuFileHandle> handle) : handle_(std::move(handle)) {}
  bool read(int, std::byte* to, size_t bytes, uint64_t offset) override { return handle_->read(to, bytes, offset); }
  void write(int, const std::byte* from, size_t bytes, uint64_t offset) override { handle_->write(from, bytes, offset); }

 private:
  const std::shared_ptr<const CuFileHandle> handle_;
};

}  // namespace

std::unique_ptr<FileIo> make_cufile_io(std::shared_ptr<const CuFileHandle> handle) { return std::make_unique<CuFileIo>(std::move(handle)); }

CuFileMemory::CuFileMemory(std::byte* data, size_t bytes) : data_(data), is_registered_(CuFile::shared().calls_->register_memory(data, bytes, 0).error == 0) {}

CuFileMemory::~CuFileMemory() {
  if (is_registered_) CuFile::shared().calls_->deregister_memory(data_);
}

}  // namespace tpla
