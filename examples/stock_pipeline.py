"""diffusers' own image-to-image pipeline with the bridge on its UNet: it now reads Chinese too."""

from diffusers import StableDiffusionImg2ImgPipeline

import bdm

shipped = bdm.BridgePipeline.from_pretrained("assets/emoji")
lantern = shipped("灯笼", guidance_scale=2.0, num_inference_steps=12, seed=3).images[0]

stock_parts = {
    name: getattr(shipped, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
}
stock = StableDiffusionImg2ImgPipeline(
    **stock_parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
)
bridge = bdm.Bridge(shipped.branch).attach(stock.unet)
encode = shipped.native_text_encoder.encode
with bridge.condition(bdm.NativeCondition(encode(["红灯笼，绿色背景"]), encode([""]))):
    picture = stock("", image=lantern, strength=0.8, guidance_scale=2.0, num_inference_steps=15).images[0]
bridge.detach()  # the UNet is bit for bit what it was

picture.resize((256, 256), resample=0).save("recoloured.png")
print("recoloured.png")
