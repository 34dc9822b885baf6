"""Other ways to a smaller cache beside matkv's, at equal bytes, on one model and one text.

    python -m benchmarks.peers --artifact RUN --out peers.json      score, then print the table
    python -m benchmarks.peers --out peers.json --table             print it again

One protocol for all (see `protocol`), one file a method:

    protocol       reading, scoring and counting bytes; the full cache
    ours           matkv, plain PCA, and matkv's latents quantized (simulated)
    quantized      transformers' QuantizedCache: quanto, hqq, fp8
    presses        kvpress: ThinK, SnapKV, expected attention, StreamingLLM
    shrink         cacheshrink
    coded          TurboQuant, and int4 per token and head as vLLM has it (simulated)
    kvtc           KVTC's transform coding (simulated)
    eviction       StreamingLLM, H2O and SnapKV at a budget that holds all along
    low_rank       Palu and Eigen Attention, written from their papers (simulated)
    environments   a virtual environment for each published package
    child          what runs inside one
    table          the rows that are kept, and the Markdown made of them

What runs inside another environment (`protocol`, `quantized`, `presses`, `shrink`, `child`) imports
nothing of matkv, whose transformers those packages may not accept.
"""
