// Moves KV rows between the engine's pool and packed records: gather (pool to records) and
// scatter (records to pool). No headers, so that nvcc and NVRTC compile the same text; no torch.
//
//   pool     `num_buffers` arrays (K and V of every layer, or MLA's one per layer); a token's row
//            in buffer b starts at base + slot * stride_bytes and is row_bytes long
//   record   one token's rows of all buffers behind each other, each at its record_offset
//   records  record i of the call lies at host + records[i] * record_bytes; null means i itself
//
// `host` is mapped pinned memory (rows cross the link as they are copied) or a staging buffer on
// the device (one bulk copy follows). One warp moves one row, and consecutive warps move the rows
// of one record, so that stores to the host arrive in order. All strides are in bytes: the kernel
// knows neither dtypes nor heads.

struct Buffer {
  unsigned long long base;
  long long stride_bytes;
  int row_bytes;
  int record_offset;
};

constexpr int kWarp = 32;
constexpr int kUnroll = 4;  // loads in flight per lane, to cover the latency of the link

// Copies `num_words` words; all loads of a round come before its stores.
template <typename Word>
__device__ __forceinline__ void copy_words(const char* from, char* to, int num_words, int lane) {
  const Word* source = reinterpret_cast<const Word*>(from);
  Word* target = reinterpret_cast<Word*>(to);
  int i = lane;
  for (; i + (kUnroll - 1) * kWarp < num_words; i += kUnroll * kWarp) {
    Word held[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) held[u] = source[i + u * kWarp];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) target[i + u * kWarp] = held[u];
  }
  for (; i < num_words; i += kWarp) target[i] = source[i];
}

// Copies a row in 16-byte words, or in the widest that both addresses allow, and the tail by byte.
__device__ __forceinline__ void copy_row(const char* from, char* to, int num_bytes, int lane) {
  const unsigned long long both =
      reinterpret_cast<unsigned long long>(from) | reinterpret_cast<unsigned long long>(to);
  int num_done = 0;
  if (both % sizeof(uint4) == 0) {
    copy_words<uint4>(from, to, num_bytes / static_cast<int>(sizeof(uint4)), lane);
    num_done = num_bytes & ~static_cast<int>(sizeof(uint4) - 1);
  } else if (both % sizeof(unsigned int) == 0) {
    copy_words<unsigned int>(from, to, num_bytes / static_cast<int>(sizeof(unsigned int)), lane);
    num_done = num_bytes & ~static_cast<int>(sizeof(unsigned int) - 1);
  }
  for (int i = num_done + lane; i < num_bytes; i += kWarp) to[i] = from[i];
}

template <typename Index, bool kIsGather>
__device__ __forceinline__ void move_rows(const Buffer* buffers, int num_buffers,
                                          const Index* slots, const long long* records,
                                          long long num_tokens, char* host,
                                          long long record_bytes) {
  const int lane = threadIdx.x % kWarp;
  const int warps_per_block = blockDim.x / kWarp;
  const long long num_warps = static_cast<long long>(gridDim.x) * warps_per_block;
  const long long num_rows = num_tokens * num_buffers;
  long long row = static_cast<long long>(blockIdx.x) * warps_per_block + threadIdx.x / kWarp;
  for (; row < num_rows; row += num_warps) {
    const long long token = row / num_buffers;
    const Buffer buffer = buffers[row - token * num_buffers];
    const long long slot = static_cast<long long>(slots[token]);
    const long long record = records == nullptr ? token : records[token];
    char* pool_row = reinterpret_cast<char*>(buffer.base) + slot * buffer.stride_bytes;
    char* host_row = host + record * record_bytes + buffer.record_offset;
    if (kIsGather) {
      copy_row(pool_row, host_row, buffer.row_bytes, lane);
    } else {
      copy_row(host_row, pool_row, buffer.row_bytes, lane);
    }
  }
}

#define KV_SWAP_KERNEL(name, Index, is_gather)                                                  \
  extern "C" __global__ void __launch_bounds__(256)                                             \
      name(const Buffer* buffers, int num_buffers, const Index* slots, const long long* records, \
           long long num_tokens, char* host, long long record_bytes) {                          \
    move_rows<Index, is_gather>(buffers, num_buffers, slots, records, num_tokens, host,         \
                                record_bytes);                                                  \
  }

KV_SWAP_KERNEL(kv_gather_i32, int, true)
KV_SWAP_KERNEL(kv_gather_i64, long long, true)
KV_SWAP_KERNEL(kv_scatter_i32, int, false)
KV_SWAP_KERNEL(kv_scatter_i64, long long, false)
