/* The kernels for front ends in other languages: optimizers over arrays in host memory, in C.
 *
 * A plan lays out tensors of fixed sizes and formats. Every step passes the addresses of all
 * arrays, so that they may move. Steps of one plan must not overlap; those of several plans may.
 * A function that fails changes nothing, and fusedopt_error() says why. Steps over arrays on a CUDA
 * device are enqueued: see enqueue_step(). */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FUSEDOPT_C_API __attribute__((visibility("default")))

typedef struct fusedopt_plan fusedopt_plan;

/* How many numbers the message of a step over ranks has (csrc/core/message.h). */
enum { FUSEDOPT_MESSAGE_SIZE = 80 };

enum { FUSEDOPT_FLOAT32, FUSEDOPT_FLOAT64, FUSEDOPT_BFLOAT16, FUSEDOPT_FLOAT16 };

/* The readings of a step. All are 0 before the first step. */
typedef struct fusedopt_control {
  double sum_of_squares; /* of the gradients before unscaling */
  double grad_norm;      /* after unscaling, before clipping */
  double clip_coef;
  double step_skipped;                            /* 0 or 1 */
  double skipped_steps, consecutive_skips, steps; /* so far, with this one */
} fusedopt_control;

/* Threads that the caller lends to a step. schedule() asks the pool to call task(argument) once, in
 * one of its threads. It may do so late, even after the step, but not never: memory is freed then.
 * A step never waits for a thread that hasn't begun. */
typedef struct fusedopt_pool {
  void* pool;
  void (*schedule)(void* pool, void (*task)(void*), void* argument);
} fusedopt_pool;

typedef struct fusedopt_step {
  void* const* arrays;      /* per tensor: the parameter, the rule's states, the rule's scalars
                               (float32); null for a state that the options don't use */
  const void* const* grads; /* per tensor; null: there is none, and the tensor is left alone */
  const double* options;    /* per group: the numbers of all options of the rule */
  double max_grad_norm;     /* infinity: never clip */
  int32_t measure;          /* measure the norm before the update; else the update sums it up */
  int32_t skip_nonfinite;   /* change nothing if a gradient holds inf or nan; needs `measure` */
  const float* grad_scale;  /* null, or the factor that the loss was multiplied by */
  const float* found_inf;   /* null, or a number that asks for a skip if it is not 0 */
  const int64_t* total;     /* null, or the sum of the messages of all ranks: see measure() */
  fusedopt_control* control;
  int32_t threads;    /* at most so many, with the caller's; 0: as many as OpenMP allows */
  fusedopt_pool pool; /* without schedule(): OpenMP's threads */
} fusedopt_step;

/* What an enqueued step needs besides. */
typedef struct fusedopt_cuda {
  int32_t device;
  void* stream; /* a cudaStream_t */
  void* memory; /* on the device: device_bytes(), at a multiple of 16; free after the step */
  const float* const* lr; /* per group: null, or where on the device its learning rate is */
  const float* factors;   /* per further scalar of the rule: what every step multiplies it by */
  int32_t* count;         /* on the device: how many steps were applied, with this one; in place */
  int32_t* skips;         /* on the device: how many were skipped; in place */
  float* grad_norm;       /* on the device: a result */
} fusedopt_cuda;

/* Why the last function that failed in this thread did so. */
FUSEDOPT_C_API const char* fusedopt_error(void);

/* JSON: {"rules": {name: {"options": {name: how many numbers}, "scalars": {name: first value},
 * "states": {name: first value}}}, "dtypes": [name], "control": [name], "step_bytes": the size of a
 * fusedopt_step, "message_size": FUSEDOPT_MESSAGE_SIZE}. The order is that of the numbers and
 * addresses that the other functions take. */
FUSEDOPT_C_API const char* fusedopt_describe(void);

/* Bit k: the rule's state k is used with these options of one group. -1: an option is refused. */
FUSEDOPT_C_API int64_t fusedopt_states_used(const char* rule, const double* options);

/* `sizes`: elements per tensor. `dtypes`: of the parameter, the states and the gradient of each
 * tensor, as an index into the dtypes of describe(): FUSEDOPT_FLOAT32 and so on. `groups`: the
 * group of each tensor; null: all are in group 0. `on_cuda`: steps are enqueued. Null is returned
 * if the tensors are refused, or if the kernels are compiled without CUDA. */
FUSEDOPT_C_API fusedopt_plan* fusedopt_new_plan(const char* rule, int64_t num_tensors,
                                                const int64_t* sizes, const int32_t* dtypes,
                                                const int32_t* groups, int64_t num_groups,
                                                int32_t on_cuda);
FUSEDOPT_C_API void fusedopt_free_plan(fusedopt_plan* plan);

/* Takes one step, or skips it. Returns 0; or -1: an option is refused. */
FUSEDOPT_C_API int fusedopt_take_step(fusedopt_plan* plan, const fusedopt_step* step);

/* The first half of a step over ranks: writes the message of this rank, FUSEDOPT_MESSAGE_SIZE
 * numbers. Ranks add up their messages, as integers, and each of them calls take_step() with the
 * total. All then have the same norm to the bit, and skip together. `counted`: per tensor, whether
 * this rank adds its squares, 0 or 1; only one rank counts a tensor that several have. Of `step`,
 * it reads `grads`, `found_inf`, `threads` and `pool`. Returns as take_step(). */
FUSEDOPT_C_API int fusedopt_measure(fusedopt_plan* plan, const fusedopt_step* step,
                                    const uint8_t* counted, int64_t* message);

/* How many bytes on the device an enqueued step needs. */
FUSEDOPT_C_API int64_t fusedopt_device_bytes(const fusedopt_plan* plan);

/* Enqueues one step on a CUDA device, and returns at once. All arrays and gradients are there. Of
 * `step`, it reads neither `total`, `control`, the threads, nor the scalars among the arrays: all
 * tensors share those of `cuda`. Returns as take_step(), and -1 also if CUDA refuses a launch. */
FUSEDOPT_C_API int fusedopt_enqueue_step(const fusedopt_plan* plan, const fusedopt_step* step,
                                         const fusedopt_cuda* cuda);

#ifdef __cplusplus
}
#endif
