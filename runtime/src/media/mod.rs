//! Media at the edge: images, clips and sound in, video and audio files out.
//!
//! | file | what |
//! | --- | --- |
//! | `frames` | RGB float frames, conversion to 8-bit RGB and BT.709 planes |
//! | `h264` | H.264 encoder and decoder (embedded) |
//! | `aac` | AAC-LC encoder (embedded) and the 16-bit conversion of audio |
//! | `mp4` | MP4 writer, the reader of what it writes, and a reader of foreign files |
//! | `wav`, `png` | uncompressed outputs |
//! | `output` | one writer for all of these: streaming, atomic, with progress |
//! | `image_input` | conditioning images: load, compress, resize, normalise |
//! | `vision_input` | the image that prompts are enhanced with |
//! | `round_trip` | the H.264 compression that conditioning images go through |
//! | `video_input`, `audio_input` | clips and recordings |
//! | `colour` | Y'CbCr to RGB |
//! | `interpolate` | another frame rate, by blending |
//! | `hdr`, `exr_frames` | a high dynamic range: what models see of it, and EXR files |
//! | `ffmpeg` | the program, where it is installed |
//!
//! No output needs another program. An `ffmpeg` on `PATH` is used for two things: the compression of conditioning images,
//! because only libx264 reproduces it to the bit (see [`round_trip`]), and inputs of kinds that nothing here reads.
//!
//! ```no_run
//! use ltxc_runtime::media::{Audio, MediaWriter, OutputOptions, Rational, VideoFormat};
//!
//! # fn main() -> Result<(), ltxc_runtime::media::MediaError> {
//! let format = VideoFormat::new(768, 512, Rational::new(24, 1)?)?;
//! let mut writer = MediaWriter::create("out.mp4".as_ref(), Some(format), OutputOptions::default())?;
//! let chunk = vec![0.5_f32; 8 * 512 * 768 * 3];
//! writer.write_frames(&chunk)?;
//! writer.write_audio(Audio::new(48_000, vec![0.0; 2 * 16_000])?)?;
//! let written = writer.finish()?;
//! println!("{} frames in {}", written.frames, written.path.display());
//! # Ok(())
//! # }
//! ```

pub mod aac;
pub mod audio_input;
mod colour;
mod error;
pub mod exr_frames;
pub mod ffmpeg;
pub mod frames;
pub mod h264;
pub mod hdr;
pub mod hlg;
pub mod image_input;
pub mod interpolate;
pub mod mp4;
pub mod output;
mod partial;
pub mod png;
pub mod round_trip;
pub mod video_input;
pub mod vision_input;
pub mod wav;

pub use aac::Audio;
pub use audio_input::{Recording, load_audio};
pub use colour::Colour;
pub use error::MediaError;
pub use exr_frames::{ExrSequence, is_exr};
pub use frames::{Frames, I420, Rational, VideoFormat};
pub use hdr::{ColourSpace, displayed};
pub use image_input::{RgbImage, load_conditioning_image, load_image, resize_and_crop, shrink_and_pad};
pub use output::{Kind, MediaWriter, OutputOptions, Written};
pub use round_trip::{RoundTrip, image_round_trip};
pub use video_input::{Clip, ClipInfo, ClipRate, Window};
