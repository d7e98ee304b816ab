"""A U-ViT with the transformer block of today's language models: the same tokens and long skip connections.

What differs from `uvit.model`: image tokens turn with their row and column (2-D RoPE, Su et al. 2021), queries and keys
are normalized (QK-norm, Dehghani et al. 2023), RMSNorm (Zhang and Sennrich 2019) and SwiGLU (Shazeer 2020) replace
LayerNorm and GELU, the mean text embedding is added to every patch, and a new model predicts zero.

Shapes in the margin, as in `uvit.model`: B batch, C latent channels, (H, W) latent size, p patch size, (h, w) = (H/p,
W/p) patches, L = 1 + T + h w tokens (one for time, T for text), D width, N heads, d head dim, M hidden width of an MLP.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from uvit.model import INIT_STD, PatchEmbed, UViTT2IModel, attention, timestep_embedding

NORM_EPS = 1e-6
ROTATION_BASE = 100.0  # the slowest channels turn by one radian in about 100 patches
SKIPS = ("concat", "add", "none")


class RMSNorm(nn.RMSNorm):
    def __init__(self, dim: int):
        super().__init__(dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rotation_angles(rows: Tensor, columns: Tensor, head_dim: int) -> Tensor:
    """The angles by which 2-D RoPE turns the patches of a grid: rows (h,), columns (w,) -> (h w, d/2), float32.

    A head has d/2 pairs of channels. The first half of the pairs turns with the row, the second with the column.
    """
    num_frequencies = head_dim // 4
    exponents = torch.arange(num_frequencies, device=rows.device, dtype=torch.float32) / num_frequencies
    frequencies = ROTATION_BASE**-exponents
    of_rows = (rows[:, None] * frequencies)[:, None].expand(-1, len(columns), -1)                # (h, w, d/4)
    of_columns = (columns[:, None] * frequencies)[None].expand(len(rows), -1, -1)                # (h, w, d/4)
    return torch.cat([of_rows, of_columns], dim=-1).flatten(0, 1)                                # (h w, d/2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels (i, i + d/2) by its angle: (B, N, L, d), (L, d/2) twice -> (B, N, L, d)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class ModernAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.head_dim = dim // num_heads
        self.fused: bool | None = None  # see `uvit.model.attention`
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, num_queries: int) -> Tensor:
        """Every token is attended to; only the last `num_queries` tokens are queries."""
        B, L, _ = x.shape
        qkv = self.qkv(x).view(B, L, 3, -1, self.head_dim)                                       # (B, L, 3, N, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)                                           # (B, N, L, d) each
        q = rotate(self.q_norm(q[:, :, -num_queries:]), cos[-num_queries:], sin[-num_queries:])  # (B, N, queries, d)
        k = rotate(self.k_norm(k), cos, sin)                                                     # (B, N, L, d)
        q, k = q.to(v.dtype), k.to(v.dtype)  # they are turned in float32
        x = attention(q, k, v, self.fused)                                                       # (B, N, queries, d)
        return self.proj(x.transpose(1, 2).flatten(2))                                           # (B, queries, D)


class SwiGLU(nn.Module):
    """An MLP whose hidden units are multiplied by gates. It has the weights of one that is 4 D wide, without gates."""

    def __init__(self, dim: int):
        super().__init__()
        hidden_dim = max(32, 32 * round(dim * 8 / 3 / 32))
        self.fc1 = nn.Linear(dim, 2 * hidden_dim, bias=False)  # the gates, then the values
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gates, values = self.fc1(x).chunk(2, dim=-1)                                             # (B, L, M) each
        return self.fc2(F.silu(gates) * values)


class ModernBlock(nn.Module):
    """A pre-norm transformer block. A long skip connection, where it gets one, is merged first."""

    def __init__(self, dim: int, num_heads: int, concat_skip: bool):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = ModernAttention(dim, num_heads)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim)
        self.skip_linear = nn.Linear(2 * dim, dim) if concat_skip else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, skip: Tensor | None = None, num_outputs: int | None = None
    ) -> Tensor:
        """(B, L, D) -> (B, L, D), or (B, num_outputs, D): only the last tokens, where only they are needed."""
        num_outputs = num_outputs or x.shape[1]
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))                                   # (B, L, D)
        elif skip is not None:
            x = x + skip
        x = x[:, -num_outputs:] + self.attn(self.norm1(x), cos, sin, num_outputs)
        return x + self.mlp(self.norm2(x))


class ModernUViTT2IModel(UViTT2IModel):
    """U-ViT for text-to-image diffusion, with modern blocks.

    Args:
        sample_size: height and width of the latents, or a pair (height, width); smaller latents take the middle of
            its position grid.
        num_layers: blocks without the middle one: num_layers // 2 before it and as many after it.
        attention_head_dim: a multiple of 4, because rows and columns each turn pairs of channels.
        clip_dim, num_text_tokens: width and length of the context.
        conv: end with a 3x3 convolution, which begins as the identity.
        bottleneck_dim: width of a bottleneck in the patch embedding, for large patches of pixels. None: none.
        skip: how long skip connections are merged: "concat" (a linear layer of both, as published), "add" or "none".
        latent_scale, latent_shift, latent_std, timestep_labels, prediction_type, path, latents: as in `UViTT2IModel`.

    Raises ValueError for sizes that do not fit together.
    """

    _no_split_modules = ["ModernBlock"]  # noqa: RUF012 - diffusers reads it off the class
    _repeated_blocks = ["ModernBlock"]  # noqa: RUF012 - the same, for compile_repeated_blocks

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 12,
        num_attention_heads: int = 8,
        attention_head_dim: int = 64,
        clip_dim: int = 768,
        num_text_tokens: int = 77,
        conv: bool = True,
        bottleneck_dim: int | None = None,
        skip: str = "concat",
        latent_scale: float | None = None,
        latent_shift: float | tuple[float, ...] | None = None,
        latent_std: float | tuple[float, ...] | None = None,
        timestep_labels: str | None = None,
        prediction_type: str | None = None,
        path: str | None = None,
        latents: str | None = None,
    ):
        ModelMixin.__init__(self)  # that of UViTT2IModel builds the published blocks
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"sample_size {height}x{width} is not a multiple of patch_size {patch_size}")
        if num_layers < 2:
            raise ValueError(f"num_layers {num_layers} is too few: the long skips need at least 2")
        if attention_head_dim % 4:
            raise ValueError(f"attention_head_dim {attention_head_dim} is not a multiple of 4")
        if skip not in SKIPS:
            raise ValueError(f"skip {skip!r} is none of {', '.join(SKIPS)}")
        dim = num_attention_heads * attention_head_dim
        self.patch_size = patch_size
        self.grid = (height // patch_size, width // patch_size)
        self.num_extra_tokens = 1 + num_text_tokens
        self.head_dim = attention_head_dim
        self.has_skips = skip != "none"
        self.gradient_checkpointing = False

        def block(concat_skip: bool = False) -> ModernBlock:
            return ModernBlock(dim, num_attention_heads, concat_skip)

        self.patch_embed = PatchEmbed(in_channels, dim, patch_size, bottleneck_dim)
        self.context_embed = nn.Linear(clip_dim, dim)
        self.pooled_text = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_extra_tokens + self.grid[0] * self.grid[1], dim))
        self.in_blocks = nn.ModuleList(block() for _ in range(num_layers // 2))
        self.mid_block = block()  # type: ignore[assignment]
        self.out_blocks = nn.ModuleList(block(skip == "concat") for _ in range(num_layers // 2))
        self.norm = RMSNorm(dim)  # type: ignore[assignment]
        self.decoder_pred = nn.Linear(dim, patch_size**2 * in_channels)
        self.final_layer = nn.Conv2d(in_channels, in_channels, 3, padding=1) if conv else nn.Identity()
        self._initialise()

    def _initialise(self) -> None:
        """Each block begins as the identity, but for its skip connection, and the model predicts zero."""
        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith(("attn.proj", "mlp.fc2", "decoder_pred")):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if isinstance(self.final_layer, nn.Conv2d):
            nn.init.dirac_(self.final_layer.weight)
            nn.init.zeros_(self.final_layer.bias)  # type: ignore[arg-type]

    def forward(self, latents: Tensor, timestep: Tensor | float, context: Tensor) -> Tensor:
        """Predict epsilon, v, x_0 or the flow, whatever the model was trained for.

        Args:
            latents: (B, C, H, W), the noisy latents x_n.
            timestep: n in (0, 1000], one for all or (B,).
            context: (B, T, clip_dim), the text encoder's last hidden state.
        Returns:
            (B, C, H, W).
        """
        B, C, H, W = latents.shape
        p, (h, w) = self.patch_size, self._patch_grid(H, W)
        if context.shape[1] != self.num_extra_tokens - 1:
            raise ValueError(f"context has {context.shape[1]} tokens; the model has {self.num_extra_tokens - 1}")
        timestep = torch.as_tensor(timestep, device=latents.device).expand(B)

        text = self.context_embed(context)                                                       # (B, T, D)
        pooled = text.mean(dim=1, keepdim=True) * text.shape[1] ** 0.5  # of the size of one token
        patches = self.patch_embed(latents) + self.pooled_text(pooled)                           # (B, h w, D)
        time = timestep_embedding(timestep, patches.shape[-1]).to(patches.dtype)[:, None]        # (B, 1, D)
        x = torch.cat([time, text, patches], dim=1)                                              # (B, L, D)
        x = x + self._positions(h, w).to(x.dtype)  # autocast computes tokens and all that follows in low precision
        cos, sin = self._rotations(h, w, x.device)                                               # (L, d/2) each

        skips: list[Tensor | None] = []
        for block in self.in_blocks:
            x = self._run(block, x, cos, sin)
            skips.append(x if self.has_skips else None)
        x = self._run(self.mid_block, x, cos, sin)
        *out_blocks, last_block = self.out_blocks
        for block in out_blocks:
            x = self._run(block, x, cos, sin, skips.pop())
        x = self._run(last_block, x, cos, sin, skips.pop(), h * w)                               # (B, h w, D)

        x = self.decoder_pred(self.norm(x))                                                      # (B, h w, p p C)
        x = x.view(B, h, w, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)
        return self.final_layer(x)

    def _rotations(self, h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of all tokens' angles, (L, d/2) float32: those of the grid's middle; 0 for time and text."""
        rows, columns = (
            torch.arange(length, device=device) + (whole - length) // 2
            for length, whole in zip((h, w), self.grid, strict=True)
        )
        angles = F.pad(rotation_angles(rows, columns, self.head_dim), (0, 0, self.num_extra_tokens, 0))
        return angles.cos(), angles.sin()
