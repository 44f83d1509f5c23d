// A libcublas.so that multiplies on the CPU and keeps a log: what is called, with which stream and
// workspace, and that the workspace is set after the stream, which forgets it.
#include <string.h>

#include <sstream>
#include <string>

namespace {
std::ostringstream record;
std::string text;
struct Handle {
    void* stream = nullptr;
    void* workspace = nullptr;
    size_t bytes = 0;
};
int handles = 0;
} // namespace

extern "C" int cublasCreate_v2(void** handle) {
    *handle = new Handle;
    record << "create " << ++handles << "\n";
    return 0;
}
extern "C" int cublasDestroy_v2(void* handle) {
    delete static_cast<Handle*>(handle);
    return 0;
}
extern "C" int cublasSetStream_v2(void* handle, void* stream) {
    *static_cast<Handle*>(handle) = {stream, nullptr, 0};
    return 0;
}
extern "C" int cublasSetWorkspace_v2(void* handle, void* workspace, size_t bytes) {
    auto& mine = *static_cast<Handle*>(handle);
    mine.workspace = workspace, mine.bytes = bytes;
    memset(workspace, 0xff, bytes); // all of it may be written
    return 0;
}
// By columns: c [m, n] = op(a) [m, k] op(b) [k, n].
extern "C" int cublasSgemm_v2(void* handle, int op_a, int op_b, int m, int n, int k,
                              const float* alpha, const float* a, int lda, const float* b, int ldb,
                              const float* beta, float* c, int ldc) {
    const auto& mine = *static_cast<Handle*>(handle);
    record << "sgemm " << m << " " << n << " " << k << " stream " << mine.stream << "\n";
    if (!mine.workspace || mine.bytes != 32 << 20) return 7;
    if (*alpha != 1.0f || *beta != 0.0f || ldc < m) return 7;
    if (lda < (op_a ? k : m) || ldb < (op_b ? n : k)) return 7;
    for (int j = 0; j < n; ++j)
        for (int i = 0; i < m; ++i) {
            float sum = 0.0f;
            for (int l = 0; l < k; ++l) {
                const float left = op_a ? a[l + long(i) * lda] : a[i + long(l) * lda];
                const float right = op_b ? b[j + long(l) * ldb] : b[l + long(j) * ldb];
                sum += left * right;
            }
            c[i + long(j) * ldc] = sum;
        }
    return 0;
}
extern "C" const char* fake_blas_log() {
    text = record.str();
    record.str("");
    return text.c_str();
}
