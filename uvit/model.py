"""The U-ViT of "All are Worth Words: A ViT Backbone for Diffusion Models" (Bao et al., CVPR 2023).

Time, words and image patches are all tokens of one sequence; long skip connections join the blocks of the first half
to those of the second, as in a U-Net. The model predicts what `uvit.diffusion` asks of it from noisy latents, the
timestep (1..1000) and the text embeddings (context).

Shapes in the margin: B batch, C latent channels, (H, W) latent size, p patch size, (h, w) = (H/p, W/p) patches,
L = 1 + T + h w tokens (one for time, T for text), D width, N heads, d head dim.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

INIT_STD = 0.02


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of the raw timestep, cosines first: (B,) -> (B, dim), float32."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timestep.device, dtype=torch.float32) / half)
    angles = timestep.float()[:, None] * frequencies                                             # (B, D/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)                                       # (B, D)


class PatchEmbed(nn.Module):
    """Patches -> tokens: one linear map, or, with a bottleneck, two with fewer features between them (JiT).

    Args:
        bottleneck_dim: the features between the two maps. None: one map, as published.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int, bottleneck_dim: int | None = None):
        super().__init__()
        bias = bottleneck_dim is None
        self.proj = nn.Conv2d(in_channels, bottleneck_dim or dim, patch_size, stride=patch_size, bias=bias)
        self.expand = nn.Identity() if bottleneck_dim is None else nn.Linear(bottleneck_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h w, D): patches in rows, left to right."""
        return self.expand(self.proj(x).flatten(2).transpose(1, 2))                              # (B, h w, D)


def attention(q: Tensor, k: Tensor, v: Tensor, fused: bool | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: queries (B, N, M, d), keys and values (B, N, L, d) -> (B, N, M, d).

    Args:
        fused: PyTorch's fused kernel, or plain matrix products, which keep the (B, N, M, L) weights until the backward.
            None: the kernel, except to train in half precision on a CPU. There its backward alone takes longer than the
            forward and backward of the products (docs/benchmarks.md).
    """
    if fused is None:
        fused = q.device.type != "cpu" or q.dtype == torch.float32 or not q.requires_grad
    if fused:
        return F.scaled_dot_product_attention(q, k, v)
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)                                    # (B, N, M, L)
    return weights.softmax(dim=-1) @ v  # PyTorch computes a softmax in float32 and rounds the result


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.head_dim = dim // num_heads
        self.fused: bool | None = None  # see `attention`
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, num_queries: int) -> Tensor:
        """Every token is attended to; only the last `num_queries` tokens are queries."""
        B, L, _ = x.shape
        qkv = self.qkv(x).view(B, L, 3, -1, self.head_dim)                                       # (B, L, 3, N, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)                                           # (B, N, L, d) each
        x = attention(q[:, :, -num_queries:], k, v, self.fused)                                  # (B, N, queries, d)
        return self.proj(x.transpose(1, 2).flatten(2))                                           # (B, queries, D)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block; those of the second half first merge their long skip connection."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, skip: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None, num_outputs: int | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D), or (B, num_outputs, D): only the last tokens, where only they are needed."""
        num_outputs = num_outputs or x.shape[1]
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))                                   # (B, L, D)
        x = x[:, -num_outputs:] + self.attn(self.norm1(x), num_outputs)
        return x + self.mlp(self.norm2(x))


class UViTT2IModel(ModelMixin, ConfigMixin):
    """U-ViT for text-to-image diffusion, of latents or of pixels.

    Args:
        sample_size: height and width of the latents (of the images, for a model on pixels), or a pair (height, width);
            smaller latents take the middle of its position grid.
        num_layers: blocks without the middle one: num_layers // 2 before it and as many after it.
        clip_dim, num_text_tokens: width and length of the context.
        conv: end with a 3x3 convolution.
        bottleneck_dim: width of a bottleneck in the patch embedding, for large patches of pixels. None: as published.
        latent_scale, latent_shift, latent_std, timestep_labels, prediction_type, path, latents: how to sample with the
            weights, see `uvit.conventions`. They change nothing here, but are saved with the model. None: not known.

    The other keys are those of the published JSON configs. Raises ValueError for sizes that do not fit together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - diffusers reads it off the class
    _repeated_blocks = ["Block"]  # noqa: RUF012 - the same, for compile_repeated_blocks

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 12,
        num_attention_heads: int = 8,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4,
        qkv_bias: bool = False,
        clip_dim: int = 768,
        num_text_tokens: int = 77,
        conv: bool = True,
        bottleneck_dim: int | None = None,
        latent_scale: float | None = None,
        latent_shift: float | tuple[float, ...] | None = None,
        latent_std: float | tuple[float, ...] | None = None,
        timestep_labels: str | None = None,
        prediction_type: str | None = None,
        path: str | None = None,
        latents: str | None = None,
    ):
        super().__init__()
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"sample_size {height}x{width} is not a multiple of patch_size {patch_size}")
        if num_layers < 2:
            raise ValueError(f"num_layers {num_layers} is too few: the long skips need at least 2")
        dim = num_attention_heads * attention_head_dim
        if dim < 2:
            raise ValueError("num_attention_heads x attention_head_dim is 1; the width must be at least 2")
        self.patch_size = patch_size
        self.grid = (height // patch_size, width // patch_size)
        self.num_extra_tokens = 1 + num_text_tokens
        self.gradient_checkpointing = False

        def block(skip: bool = False) -> Block:
            return Block(dim, num_attention_heads, mlp_ratio, qkv_bias, skip)

        self.patch_embed = PatchEmbed(in_channels, dim, patch_size, bottleneck_dim)
        self.context_embed = nn.Linear(clip_dim, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_extra_tokens + self.grid[0] * self.grid[1], dim))
        self.in_blocks = nn.ModuleList(block() for _ in range(num_layers // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(skip=True) for _ in range(num_layers // 2))
        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, patch_size**2 * in_channels)
        self.final_layer = nn.Conv2d(in_channels, in_channels, 3, padding=1) if conv else nn.Identity()

        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD)  # cut at +-2 absolute, so the std is 0.02
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "UViTT2IModel":
        """As in diffusers, from safetensors only. `uvit.load_unet` opens the formats of other U-ViT code."""
        return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})

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

        patches = self.patch_embed(latents)                                                      # (B, h w, D)
        time = timestep_embedding(timestep, patches.shape[-1]).to(patches.dtype)[:, None]        # (B, 1, D)
        x = torch.cat([time, self.context_embed(context), patches], dim=1)                       # (B, L, D)
        x = x + self._positions(h, w).to(x.dtype)  # autocast computes tokens and all that follows in low precision

        skips = []
        for block in self.in_blocks:
            x = self._run(block, x)
            skips.append(x)
        x = self._run(self.mid_block, x)
        *out_blocks, last_block = self.out_blocks
        for block in out_blocks:
            x = self._run(block, x, skips.pop())
        x = self._run(last_block, x, skips.pop(), h * w)                                         # (B, h w, D)

        x = self.decoder_pred(self.norm(x))                                                      # (B, h w, p p C)
        x = x.view(B, h, w, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)
        return self.final_layer(x)

    def _patch_grid(self, H: int, W: int) -> tuple[int, int]:
        p, (rows, columns) = self.patch_size, self.grid
        if H % p or W % p:
            raise ValueError(f"latents of {H}x{W} cannot be cut into patches of {p}x{p}")
        if H // p > rows or W // p > columns:
            raise ValueError(
                f"latents of {H}x{W} need {H // p}x{W // p} positions; the model has {rows}x{columns} "
                f"(sample_size {rows * p}x{columns * p})"
            )
        return H // p, W // p

    def _positions(self, h: int, w: int) -> Tensor:
        """Position embeddings of an h x w grid of patches: the middle of the trained grid. -> (1, 1 + T + h w, D)"""
        rows, columns = self.grid
        if (h, w) == self.grid:
            return self.pos_embed
        extra, patches = self.pos_embed.split([self.num_extra_tokens, rows * columns], dim=1)
        top, left = (rows - h) // 2, (columns - w) // 2
        patches = patches.unflatten(1, self.grid)[:, top : top + h, left : left + w].flatten(1, 2)
        return torch.cat([extra, patches], dim=1)

    def _run(self, block: nn.Module, *args: Tensor | int | None) -> Tensor:
        """Run a block, keeping its activations for the backward pass or, with checkpointing, recomputing them."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)


def blocks_in_order(unet: UViTT2IModel) -> list[Block]:
    """All Transformer blocks, in the order in which the forward pass runs them."""
    return [*unet.in_blocks, unet.mid_block, *unet.out_blocks]
