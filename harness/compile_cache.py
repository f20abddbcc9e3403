import os


def use_compile_cache(source, folder):
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
