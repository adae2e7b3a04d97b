/* asrkf.h - a KV cache that freezes, for llama.cpp: the C boundary.
 *
 * Words: a cell is one slot of the KV cache on the device; the pool is all of them, allocated once. Tokens that matter
 * little now are frozen: out of attention, bytes in host RAM, position kept. They come back (restore) with the same
 * bytes. The window (most recent positions), the sinks (first positions) and pinned positions are never frozen.
 *
 * Rules: every function returns a status unless it says otherwise; anything but ASRKF_OK leaves cache and host store as
 * they were, and asrkf_last_error() gives the text. Nothing throws across this boundary. Structs start with
 * struct_size, which the caller sets to sizeof. A context is used from one thread at a time, as with llama.h.
 */
#ifndef ASRKF_H
#define ASRKF_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#    define ASRKF_API __declspec(dllexport)
#else
#    define ASRKF_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct llama_context;
struct llama_model;

enum asrkf_status {
    ASRKF_OK               = 0,
    ASRKF_INVALID_ARGUMENT = 1, /* NULL, unknown key, value out of range */
    ASRKF_NO_POLICY        = 2, /* the context runs upstream's cache */
    ASRKF_PROTECTED        = 3, /* the range touches window, sinks or pinned positions */
    ASRKF_POOL_FULL        = 4, /* the pool cannot hold what was asked for */
    ASRKF_HOST_LIMIT       = 5, /* the host store would grow over host_limit */
    ASRKF_UNSUPPORTED      = 6, /* not with this model, cache type or context */
    ASRKF_MOVE_FAILED      = 7, /* a backend failed to copy rows */
    ASRKF_INTERNAL         = 8
};

enum asrkf_policy {
    ASRKF_POLICY_FULL     = 0, /* upstream's cache */
    ASRKF_POLICY_ASRKF    = 1, /* budget by relevance, slow timers: the default */
    ASRKF_POLICY_PAPER    = 2, /* arXiv 2512.11221: mean |q.k| below tau, sublinear timers */
    ASRKF_POLICY_WINDOW   = 3, /* control: the most recent tokens only */
    ASRKF_POLICY_RANDOM   = 4, /* control: the machinery of asrkf on random scores */
    ASRKF_POLICY_FLAG_ALL = 5, /* control: every token older than the window is flagged at every check */
    ASRKF_POLICY_REFREEKV = 6, /* arXiv 2502.16886: where a prompt ends, as much is frozen as its last query's attention allows */
    ASRKF_POLICY_KVZIP    = 7  /* arXiv 2601.17668: gates score each token once, by its hidden state alone */
};

/* Configuration. asrkf_config_default() fills it, asrkf_config_parse() reads "name,key=value,...". The keys, their
 * ranges, defaults and meanings are one table: see asrkf_config_field(). */
struct asrkf_config {
    uint32_t struct_size;
    int32_t  policy;           /* enum asrkf_policy */
    uint32_t pool_cells;       /* at most one of the four is not 0; none: what fits the device. Cells, */
    float    pool_ratio;       /*   part of n_ctx (0..1], */
    uint64_t pool_bytes;       /*   bytes of K, V and index together, */
    float    pool_f16_percent; /*   or so much of the bytes that K and V of n_ctx tokens have in F16, without sliding windows (0..100] */
    int32_t  types;
    uint32_t sinks;
    uint32_t window;           /* 0: half of the group's pool */
    uint32_t interval;
    int32_t  score;
    uint32_t score_queries;
    int32_t  index;
    float    ema;
    float    hysteresis;
    int32_t  ranking;
    int32_t  recall;
    float    recall_share;
    uint32_t recall_limit;
    uint32_t rewalk_tokens;
    int32_t  recovery;
    int32_t  trigger;
    float    trigger_share;
    float    look_share;
    int32_t  look_trigger;
    float    softness;
    float    timer_share;
    uint32_t timer_grace;
    float    tau;
    float    tolerance;        /* of refreekv, and the next three */
    uint32_t rows;
    int32_t  order;
    uint32_t repeat;           /* tokens; 0: never */
    float    gate_threshold;   /* of kvzip; 0: none */
    uint32_t block;
    uint32_t seed;
    int32_t  moves;
    int32_t  state;
    uint64_t host_limit;       /* bytes, 0: no limit */
    uint64_t device_limit;     /* bytes, 0: what is free */
    char     layers[1024];
    char     calibration[1024];
    char     gates[1024];      /* with score=gate; "": the model's own, asrkf_gates_file() */
    char     score_layers[1024];
    char     pinned[1024];
};

/* One row of the configuration table. All strings live as long as the library. */
struct asrkf_field {
    uint32_t     struct_size;
    const char * name;
    const char * kind;         /* "integer", "real", "bytes", "choice", "text", "pool" */
    const char * choices;      /* "a|b|c" for a choice, else "" */
    double       minimum;      /* of numbers */
    double       maximum;
    const char * doc;
};

struct asrkf_stats {
    uint32_t struct_size;
    int32_t  policy;                   /* the one that really runs */
    uint32_t n_groups;
    uint32_t pool_cells;               /* means over the layers; asrkf_get_group_stats() has each group's */
    uint32_t active_cells;
    uint32_t frozen_cells;
    uint32_t enough_cells;             /* refreekv: the pool with which the last cut could have kept all that its rule wanted, in every layer; 0: no cut yet */
    uint32_t n_sequences;              /* that have tokens */
    int32_t  type_k;                   /* enum ggml_type, of the cache; -1 where upstream's cache has none to name */
    int32_t  type_v;
    uint64_t tokens;                   /* of all sequences, those that they share once: active + frozen */
    uint64_t device_kv_bytes;          /* what the backends allocated for K and V */
    uint64_t device_index_bytes;       /* and for scoring: K rows of the scoring layers in a small type, or means of them, and the newest queries; for cuts: queries; for gates: their weights, and the scores of a step */
    uint64_t device_staging_bytes;     /* and for moving rows (0 where device memory is host memory, or the device reaches the host's) */
    uint64_t device_compute_bytes;     /* and for graphs: the scheduler's compute buffers, and those of scoring and cuts */
    uint64_t host_kv_bytes;            /* allocated for the host store */
    uint64_t host_kv_peak_bytes;
    uint64_t moved_to_host_bytes;
    uint64_t moved_to_device_bytes;
    uint64_t moves_to_host_total;      /* batched calls, not rows */
    uint64_t moves_to_device_total;
    uint64_t freezes_total;            /* tokens, all groups */
    uint64_t restores_timer_total;     /* a freeze timer ended */
    uint64_t restores_window_total;    /* protected again: the window moved back, or the position was pinned */
    uint64_t restores_refill_total;    /* the pool had room */
    uint64_t restores_recall_total;    /* a live query scored it high */
    uint64_t restores_redundant_total; /* of these, frozen again before the next decision but one: the query did not last */
    uint64_t restores_recovery_total;  /* output entropy asked for more, or a second look */
    uint64_t restores_request_total;   /* asrkf_restore() */
    uint64_t cuts_total;               /* refreekv: times that its rule was applied, where a prompt ended or repeated */
    uint64_t rewalks_total;            /* times that the end of a prompt was computed again */
    uint64_t rewalked_tokens_total;
    uint64_t second_looks_total;       /* tokens that were computed a second time, for what they missed */
    uint64_t recoveries_soft_total;
    uint64_t recoveries_window_total;
    uint64_t recoveries_full_total;
    uint64_t outputs_total;            /* output rows whose entropy was measured */
    float    kept_ratio;               /* of the tokens at the last cut, mean over the layers; -1: no cut yet */
    float    missed_attention_ratio;   /* at the last scoring: part of the scoring layers' attention that fell on frozen tokens, mean of all heads; -1: no scores */
    float    missed_attention_worst_ratio; /* and of the worst head */
    float    entropy;                  /* of the last one, nats */
    float    entropy_mean;
    float    entropy_deviation;
    uint64_t steps_total;              /* ubatches */
    uint64_t decisions_total;
    uint64_t scoring_steps_total;      /* scorings of the index */
    double   policy_seconds;
    double   scoring_seconds;          /* waiting for scores and folding them in; computing them is part of the step */
    double   moves_seconds;
    char     scoring_backend[16];      /* what computes scores: "graph" (ggml's operations), "cuda" (our kernels), "cuda+graph" where devices differ; "gates": the model's graph; "none": nothing is scored */
    char     ranking[8];               /* of the index's scores: "own" or "shared", as a device without the operations for the first has it, too; "none": no index is scored */
};

struct asrkf_group_stats {
    uint32_t struct_size;
    uint32_t n_layers;
    uint32_t pool_cells;
    uint32_t window;                   /* of sequence 0, by its share of the pool in its last step */
    uint32_t max_ubatch;               /* and the longest step that it lets through */
    uint32_t active_cells;
    uint32_t active_copied_cells;      /* of these, with a valid host copy */
    uint32_t frozen_cells;
    float    kept_ratio;               /* of the tokens at the last cut; -1: none yet, or none here */
    float    wanted_ratio;             /* and what the rule would have kept in a larger pool */
    uint32_t sliding_window;           /* tokens that these layers see: the group keeps them whatever the policy; 0: all */
    uint64_t token_bytes;              /* K and V of one token in this group's layers */
    uint64_t device_kv_bytes;
    char     layers[1024];             /* the model's, as asrkf_config's layers names them: "0-4+7" */
};

/* What an output row says of the next token; logits in nats. A row without any finite logit has entropy 0 and top 0. */
struct asrkf_output {
    uint32_t struct_size;
    double   log_sum_exp;              /* of the logits: a token's log-probability is its logit less this */
    double   entropy;                  /* Shannon's, nats */
    double   top_probability;
};

/* One step (ubatch), all groups together; cells are means over the layers. */
struct asrkf_step {
    uint64_t index;
    int32_t  pos;                      /* of the first token */
    uint32_t n_tokens;
    uint32_t active_cells;             /* after the step was placed */
    uint32_t frozen_cells;
    uint32_t freezes;
    uint32_t restores;
    uint32_t scored;                   /* 1: the index was scored after the step */
    uint32_t occasion;                 /* 0: the interval; 1: the end of a prompt, computed again; recovery: 2 soft, 3 window, 4 full; 5: a second look */
    float    entropy;                  /* nats, of the output before this step; measured while a trace runs, or recovery is on */
    float    missed_attention_ratio;   /* of the last scoring before this step, mean of all heads and worst; -1: no scores yet */
    float    missed_attention_worst_ratio;
    float    policy_seconds;
    float    moves_seconds;
};

/* What a context has on one device: allocated, or for a model that was loaded with no_alloc, what would be. */
struct asrkf_device_memory {
    uint32_t struct_size;
    uint32_t is_host;
    uint64_t weights_bytes;
    uint64_t cache_bytes;      /* K, V and index */
    uint64_t compute_bytes;
    uint64_t free_bytes;       /* now; of the host what the system says is available */
    uint64_t margin_bytes;     /* that pool=auto would leave of that, or of what is pretended */
    char     name[64];
};

/* States of a token in one layer group. */
enum asrkf_token_state { ASRKF_TOKEN_ACTIVE = 0, ASRKF_TOKEN_ACTIVE_COPIED = 1, ASRKF_TOKEN_FROZEN = 2 };

/* Text and status of the last failing call on this thread, also of a refused context or a failing llama_decode(); "" and
 * ASRKF_OK if none.
 * Valid until the next call on this thread. */
ASRKF_API const char * asrkf_last_error(void);
ASRKF_API enum asrkf_status asrkf_last_status(void);
ASRKF_API void         asrkf_clear_error(void);
ASRKF_API const char * asrkf_version(void);
ASRKF_API const char * asrkf_status_name(enum asrkf_status status);

/* Fill *out with the preset's values (the pool: what fits the device). */
ASRKF_API enum asrkf_status asrkf_config_default(int32_t policy, struct asrkf_config * out);
/* Read "name" or "name,key=value,..."; *out is written on success only. */
ASRKF_API enum asrkf_status asrkf_config_parse(const char * text, struct asrkf_config * out);
/* Write the whole configuration as such a string; size includes the final NUL. */
ASRKF_API enum asrkf_status asrkf_config_format(const struct asrkf_config * config, char * out, size_t size);
/* Row i of the table; ASRKF_INVALID_ARGUMENT past the last. */
ASRKF_API enum asrkf_status asrkf_config_field(size_t i, struct asrkf_field * out);

/* Settings for the next context that this thread creates; consumed when its memory is made, also if that fails. (A
 * creation that llama.cpp refuses before, such as without a model, leaves them.) NULL takes them back. They go before
 * the environment variable LLAMA_KV_POLICY (same string), which serves every context. */
ASRKF_API enum asrkf_status asrkf_next_context(const struct asrkf_config * config);

/* Freeze, restore, pin, unpin positions [p0, p1) of a sequence in every layer group; p1 < 0 means to the end.
 * A frozen range stays frozen until asrkf_restore(), or until the window covers it. out_tokens (may be NULL) gets the
 * number of tokens whose state changed, summed over groups. All or nothing. */
ASRKF_API enum asrkf_status asrkf_freeze (struct llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1, uint64_t * out_tokens);
ASRKF_API enum asrkf_status asrkf_restore(struct llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1, uint64_t * out_tokens);
ASRKF_API enum asrkf_status asrkf_pin    (struct llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1);
ASRKF_API enum asrkf_status asrkf_unpin  (struct llama_context * ctx, int32_t seq_id, int32_t p0, int32_t p1);

/* follows != 0: the next llama_decode() calls continue a prompt, so its end is not there yet. Without it, several tokens
 * with one output, the last, are taken for the end of a prompt. */
ASRKF_API enum asrkf_status asrkf_prompt_follows(struct llama_context * ctx, int32_t follows);

/* Another host_limit from now on, bytes, 0 for none: where one refused a step, that step may come again. A limit below what is
 * in use is refused (ASRKF_HOST_LIMIT). */
ASRKF_API enum asrkf_status asrkf_set_host_limit(struct llama_context * ctx, uint64_t limit_bytes);

/* Name of a model by shape and weights, for the side file of a calibration; size includes the final NUL (64 is enough). */
ASRKF_API enum asrkf_status asrkf_model_fingerprint(const struct llama_model * model, char * out, size_t size);

/* Which of n_layers layers score where that was not measured (score_layers=auto without a calibration), into out; out_n: how
 * many there are. Counted are layers that have a cache and no sliding window. Writes none beyond capacity. */
ASRKF_API enum asrkf_status asrkf_default_score_layers(uint32_t n_layers, uint32_t * out, size_t capacity, size_t * out_n);

/* One pass of the model over tokens (1,024 are enough, 512 the least; whole 256 are read), with upstream's cache in a context of
 * its own: how much each layer's history matters. Of the layers that have a cache and no sliding window, in order: what a
 * layer's output loses, into out_sensitivities; and which layers score, into out_score_layers, ascending: those by depth. Neither gets
 * more than capacity; *out_n_layers and *out_n_score_layers tell how many there are. n_threads: 0 for llama.cpp's default. progress (may
 * be NULL) is called with what is done and what there is to do, on this thread; not 0 stops (ASRKF_INTERNAL). The same
 * tokens give the same figures. ASRKF_UNSUPPORTED: this model cannot be calibrated so, and the text says why. */
typedef int32_t (*asrkf_progress)(void * user, size_t done, size_t all);
ASRKF_API enum asrkf_status asrkf_calibrate(struct llama_model * model, const int32_t * tokens, size_t n_tokens, int32_t n_threads, asrkf_progress progress, void * user,
        double * out_sensitivities, uint32_t * out_score_layers, size_t capacity, size_t * out_n_layers, size_t * out_n_score_layers);

/* Where the side file of this model is looked for when the settings name none; size includes the final NUL. */
ASRKF_API enum asrkf_status asrkf_calibration_file(const struct llama_model * model, char * out, size_t size);
/* The same of its gates. */
ASRKF_API enum asrkf_status asrkf_gates_file(const struct llama_model * model, char * out, size_t size);

/* What makes a side file when a context of this thread needs one and has none: asked while the context is created, it writes the
 * file's name to out and returns 0; 1: there is none, and budgets are a guess by depth; 2: the context is refused. NULL takes
 * it back. */
typedef int32_t (*asrkf_calibrator)(void * user, struct llama_model * model, char * out, size_t size);
ASRKF_API enum asrkf_status asrkf_next_calibrator(asrkf_calibrator calibrator, void * user);

/* Shannon entropy in nats of softmax(logits). */
ASRKF_API enum asrkf_status asrkf_entropy(const float * logits, size_t n, double * out_entropy);
/* The same and more of an output row of the last llama_decode(), i as in llama_get_logits_ith(); waits for it. Where a backend
 * sampler took the row, and left its logits on the device, it is read there (on CUDA by a kernel), for the last row of each
 * sequence, until its tokens are removed. Serves upstream's cache, too, but for such rows: ASRKF_UNSUPPORTED.
 * ASRKF_INVALID_ARGUMENT: there is no such row; ASRKF_INTERNAL: a logit is NaN, or the device failed. */
ASRKF_API enum asrkf_status asrkf_output_entropy(struct llama_context * ctx, int32_t i, struct asrkf_output * out);

/* The configuration that runs: a pool that was chosen is in cells. */
ASRKF_API enum asrkf_status asrkf_get_config     (struct llama_context * ctx, struct asrkf_config * out);
/* What was chosen for the pool and why, one line; "" where cells or a part of n_ctx were asked for. size includes the final NUL
 * (512 is enough). */
ASRKF_API enum asrkf_status asrkf_get_pool_choice(struct llama_context * ctx, char * out, size_t size);
/* asrkf_get_stats() serves upstream's cache, too: policy ASRKF_POLICY_FULL, no groups to ask about. */
ASRKF_API enum asrkf_status asrkf_get_stats      (struct llama_context * ctx, struct asrkf_stats * out);
ASRKF_API enum asrkf_status asrkf_get_group_stats(struct llama_context * ctx, uint32_t group, struct asrkf_group_stats * out);

/* Row i of the devices that a context uses; ASRKF_INVALID_ARGUMENT past the last. Serves upstream's cache, too. */
ASRKF_API enum asrkf_status asrkf_get_device_memory(struct llama_context * ctx, size_t i, struct asrkf_device_memory * out);
/* For planning: on this thread, until it is called with 0, pool=auto takes every device that holds K and V to have so many bytes
 * free before the weights are there, and the RAM for frozen tokens to be enough. For contexts of models loaded with no_alloc. */
ASRKF_API enum asrkf_status asrkf_pretend_free(uint64_t bytes);

/* States of a sequence's tokens in one layer group, in order of position: positions to out_pos, enum
 * asrkf_token_state to out_state (either may be NULL), at most capacity of them; *out_n gets how many there are. */
ASRKF_API enum asrkf_status asrkf_get_tokens(struct llama_context * ctx, int32_t seq_id, uint32_t group, int32_t * out_pos, uint8_t * out_state, size_t capacity, size_t * out_n);
/* Positions of a sequence that are pinned, as ranges [begin, end), ascending: two numbers each to out (may be NULL if capacity is
 * 0), at most capacity ranges; *out_n gets how many there are. */
ASRKF_API enum asrkf_status asrkf_get_pinned(struct llama_context * ctx, int32_t seq_id, int32_t * out, size_t capacity, size_t * out_n);
/* Raw cache bytes (K then V, layer by layer) of a sequence's token at pos in one layer group, from wherever they are. size must
 * be the group's token_bytes. */
ASRKF_API enum asrkf_status asrkf_get_rows(struct llama_context * ctx, int32_t seq_id, uint32_t group, int32_t pos, void * out, size_t size);

/* Record every step into the caller's ring buffer (NULL: stop); both start the count anew. The buffer must outlive the
 * context or the call that stops it. asrkf_trace_count() gives the steps recorded so far; entry i is at i % capacity. */
ASRKF_API enum asrkf_status asrkf_trace(struct llama_context * ctx, struct asrkf_step * buffer, size_t capacity);
ASRKF_API enum asrkf_status asrkf_trace_count(struct llama_context * ctx, uint64_t * out_n);

#ifdef __cplusplus
}
#endif

#endif
