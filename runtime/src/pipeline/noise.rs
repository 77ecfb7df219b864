//! Where noise comes from: recorded files where they exist, else the generator; what was drawn can be saved.
//!
//! A slot is one tensor of noise. The four slots of a two-stage run have files of their own (load if present, else save,
//! never overwrite). Everything else is drawn from the stream of its name.
//!
//! Source: spec/pipelines §10.3, §10.4; spec/debug-tools §6.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::error::RunError;
use crate::random::NormalStream;

/// Source of all noise of a run.
#[derive(Clone, Debug, Default)]
pub struct Noise {
    /// Seed of everything that is not given.
    pub seed: u64,
    /// Noise given from outside, by slot name (`stage1.video`, `stage1.video.extra`, `stage1.audio` …), in token form.
    pub given: BTreeMap<String, Vec<f32>>,
    /// Files by slot name: read if they exist, else written.
    pub files: BTreeMap<String, PathBuf>,
}

/// Layout of a slot: tokens of `channels` values on a grid of `spatial` extents (`[f, h, w]`, or `[t]` for sound, whose
/// channels split further into `inner` values that are fastest in token form).
#[derive(Clone, Debug)]
pub struct SlotShape {
    /// Extents of the token grid.
    pub spatial: Vec<usize>,
    /// Width of a token.
    pub channels: usize,
    /// Values of a token that lie behind the grid in the native layout: 16 mel bins for sound, 1 for video.
    pub inner: usize,
}

impl SlotShape {
    fn tokens(&self) -> usize {
        self.spatial.iter().product()
    }

    fn len(&self) -> usize {
        self.tokens() * self.channels
    }

    /// The native shape: `(1, c, f, h, w)` or `(1, c, t, mel)`.
    fn native(&self) -> Vec<usize> {
        let mut shape = vec![1, self.channels / self.inner];
        shape.extend(&self.spatial);
        if self.inner > 1 {
            shape.push(self.inner);
        }
        shape
    }

    /// Token form from the native layout.
    fn to_tokens(&self, native: &[f32]) -> Vec<f32> {
        let (n, outer) = (self.tokens(), self.channels / self.inner);
        let mut out = vec![0.0; native.len()];
        for c in 0..outer {
            for t in 0..n {
                for i in 0..self.inner {
                    out[t * self.channels + c * self.inner + i] = native[(c * n + t) * self.inner + i];
                }
            }
        }
        out
    }

    /// The native layout from token form.
    fn to_native(&self, tokens: &[f32]) -> Vec<f32> {
        let (n, outer) = (self.tokens(), self.channels / self.inner);
        let mut out = vec![0.0; tokens.len()];
        for c in 0..outer {
            for t in 0..n {
                for i in 0..self.inner {
                    out[(c * n + t) * self.inner + i] = tokens[t * self.channels + c * self.inner + i];
                }
            }
        }
        out
    }
}

impl Noise {
    /// The noise of a slot in token form.
    ///
    /// # Errors
    /// Given or recorded noise of another shape, or a file that cannot be read or written.
    pub fn draw(&self, slot: &str, shape: &SlotShape) -> Result<Vec<f32>, RunError> {
        if let Some(values) = self.given.get(slot) {
            if values.len() != shape.len() {
                return Err(RunError::Input(format!(
                    "noise `{slot}` has {} values, this run needs {} ({:?} tokens of {})",
                    values.len(),
                    shape.len(),
                    shape.spatial,
                    shape.channels
                )));
            }
            return Ok(values.clone());
        }
        let Some(path) = self.files.get(slot) else {
            return Ok(NormalStream::new(self.seed, slot).draw(shape.len()));
        };
        if path.exists() {
            return read(path, shape);
        }
        let values = NormalStream::new(self.seed, slot).draw(shape.len());
        write(path, shape, &values)?;
        Ok(values)
    }
}

/// Reads a noise file: one f32 tensor `noise`, native layout or tokens.
fn read(path: &Path, shape: &SlotShape) -> Result<Vec<f32>, RunError> {
    let bytes = std::fs::read(path).map_err(|e| RunError::io(path, e))?;
    let bad = |problem: String| RunError::Input(format!("noise file `{}`: {problem}", path.display()));
    let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;
    let view = file.tensor("noise").map_err(|_| bad("there is no tensor `noise` in it".into()))?;
    let values: Vec<f32> = match view.dtype() {
        Dtype::F32 => view.data().as_chunks::<4>().0.iter().map(|&c| f32::from_le_bytes(c)).collect(),
        Dtype::BF16 => view.data().as_chunks::<2>().0.iter().map(|&c| half::bf16::from_le_bytes(c).to_f32()).collect(),
        other => return Err(bad(format!("`noise` is {other:?}, expected F32 or BF16"))),
    };
    let tokens = [1, shape.tokens(), shape.channels];
    if view.shape() == shape.native() {
        Ok(shape.to_tokens(&values))
    } else if view.shape() == tokens {
        Ok(values)
    } else {
        Err(bad(format!("`noise` is {:?}, this run needs {:?} or tokens {tokens:?}", view.shape(), shape.native())))
    }
}

fn write(path: &Path, shape: &SlotShape, tokens: &[f32]) -> Result<(), RunError> {
    let native = shape.to_native(tokens);
    let bytes: &[u8] = bytemuck::cast_slice(&native);
    let view = TensorView::new(Dtype::F32, shape.native(), bytes).map_err(|e| RunError::Internal(e.to_string()))?;
    let encoded = safetensors::serialize([("noise", view)], None).map_err(|e| RunError::Internal(e.to_string()))?;
    crate::files::write_atomically(path, &encoded)
}
