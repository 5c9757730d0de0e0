// csrc/kv_swap.cu as a C++ program: the same text, its threads run one after the other. Possible
// because they do not talk to each other. Checks the kernel's arithmetic, not a GPU's behaviour.

struct Dim {
  unsigned x;
};
static Dim threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)

#include KERNEL_SOURCE

template <typename Index>
using Kernel = void (*)(const Buffer*, int, const Index*, const long long*, long long, char*,
                        long long);

template <typename Index>
static void run(Kernel<Index> kernel, unsigned num_blocks, unsigned num_threads,
                const Buffer* buffers, int num_buffers, const Index* slots,
                const long long* records, long long num_tokens, char* host,
                long long record_bytes) {
  gridDim.x = num_blocks;
  blockDim.x = num_threads;
  for (blockIdx.x = 0; blockIdx.x < num_blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < num_threads; ++threadIdx.x)
      kernel(buffers, num_buffers, slots, records, num_tokens, host, record_bytes);
}

#define RUN(name, Index)                                                                       \
  extern "C" void run_##name(unsigned num_blocks, unsigned num_threads, const Buffer* buffers, \
                             int num_buffers, const Index* slots, const long long* records,    \
                             long long num_tokens, char* host, long long record_bytes) {       \
    run<Index>(name, num_blocks, num_threads, buffers, num_buffers, slots, records, num_tokens, \
               host, record_bytes);                                                            \
  }

RUN(kv_gather_i32, int)
RUN(kv_gather_i64, long long)
RUN(kv_scatter_i32, int)
RUN(kv_scatter_i64, long long)
