// A libcuda.so.1 that keeps a log of its calls and runs kernels on the emulator: what stands
// between Rust and a device, tested on a machine without one.
#include <dlfcn.h>
#include <string.h>

#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace {
std::ostringstream record;
std::string text;
std::map<std::string, int> failures; // by the name of a call: the status it gives
std::map<std::string, long> numbers = {{"devices", 1}, {"version", 13000}, {"architecture", 90}};
std::vector<void*> emulators; // each has kernels of one module
thread_local void* current = nullptr;

int called(const char* name) {
    record << name << "\n";
    const auto found = failures.find(name);
    return found == failures.end() ? 0 : found->second;
}
} // namespace

#define CALL(name, ...)                                  \
    extern "C" int name(__VA_ARGS__) {                   \
        if (const int status = called(#name)) return status;
#define END       \
    return 0;     \
    }

CALL(cuInit, unsigned) END
CALL(cuDriverGetVersion, int* version) *version = int(numbers["version"]); END
CALL(cuDeviceGetCount, int* count) *count = int(numbers["devices"]); END
CALL(cuDeviceGet, int* device, int ordinal) *device = ordinal; END
CALL(cuDeviceGetAttribute, int* value, int attribute, int)
    const int architecture = int(numbers["architecture"]);
    *value = attribute == 75 ? architecture / 10 : attribute == 76 ? architecture % 10 : -1;
END
CALL(cuDevicePrimaryCtxRetain, void** context, int device)
    *context = reinterpret_cast<void*>(0x1000L + device);
END
CALL(cuCtxGetCurrent, void** context) *context = current; END
CALL(cuCtxSetCurrent, void* context) current = context; END
CALL(cuModuleLoadData, void** module, const void* image)
    if (memcmp(image, "\x7f" "ELF", 4)) return 200;
    static long count = 0;
    *module = reinterpret_cast<void*>(++count);
END
CALL(cuModuleUnload, void*) END
CALL(cuModuleGetFunction, void** function, void*, const char* name)
    *function = strdup(name);
    record << "  " << name << "\n";
END
CALL(cuFuncSetAttribute, void*, int, int) END
// NVRTC looks for private functions of the driver, and does without them.
extern "C" int cuGetExportTable(const void**, const void*) { return 500; }

#ifndef WITHOUT_LAUNCH
CALL(cuLaunchKernel, void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
     unsigned by, unsigned bz, unsigned shared, void* stream, void** arguments, void**)
    const char* name = static_cast<const char*>(function);
    record << "  " << name << " context " << current << " stream " << stream << "\n";
    using Launch = const char*(const char*, const unsigned*, const unsigned*, unsigned, void**,
                               int, unsigned);
    const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    Launch* launch = nullptr;
    for (void* emulator : emulators) {
        auto* signature = reinterpret_cast<const char* (*)(const char*)>(
            dlsym(emulator, "cuemu_signature"));
        if (signature && signature(name))
            launch = reinterpret_cast<Launch*>(dlsym(emulator, "cuemu_launch"));
    }
    if (!launch) return 700;
    const char* message = launch(name, grid, block, shared, arguments, 0, 0);
    if (message) record << "  " << message << "\n";
    return message ? 700 : 0;
    }
#endif

// What the tests say and ask.
extern "C" void fake_number(const char* name, long value) { numbers[name] = value; }
extern "C" void fake_failure(const char* call, int status) { failures[call] = status; }
extern "C" void fake_emulator(const char* path) {
    emulators.push_back(dlopen(path, RTLD_NOW | RTLD_LOCAL));
}
extern "C" void fake_current(void* context) { current = context; }
extern "C" void* fake_get_current() { return current; }
extern "C" const char* fake_log() {
    text = record.str();
    record.str("");
    return text.c_str();
}
