//! One value for each modality that a pipeline has.

use ltxc_ir::plan::Modality;

/// A value per modality; `None` for one that the pipeline does not make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Per<T> {
    /// Of the picture.
    pub video: Option<T>,
    /// Of the sound.
    pub audio: Option<T>,
}

/// Nothing for either.
impl<T> Default for Per<T> {
    fn default() -> Per<T> {
        Per { video: None, audio: None }
    }
}

impl<T> Per<T> {
    /// What `of` gives for each modality.
    pub fn new(mut of: impl FnMut(Modality) -> Option<T>) -> Per<T> {
        Per { video: of(Modality::Video), audio: of(Modality::Audio) }
    }

    /// The value of one modality.
    pub fn get(&self, modality: Modality) -> Option<&T> {
        match modality {
            Modality::Video => self.video.as_ref(),
            Modality::Audio => self.audio.as_ref(),
        }
    }

    /// The place of one modality.
    pub fn slot(&mut self, modality: Modality) -> &mut Option<T> {
        match modality {
            Modality::Video => &mut self.video,
            Modality::Audio => &mut self.audio,
        }
    }

    /// The values there are, video first.
    pub fn iter(&self) -> impl Iterator<Item = (Modality, &T)> {
        Modality::BOTH.into_iter().filter_map(|m| Some((m, self.get(m)?)))
    }

    /// The values there are, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (Modality, &mut T)> {
        let both = [(Modality::Video, &mut self.video), (Modality::Audio, &mut self.audio)];
        both.into_iter().filter_map(|(m, value)| Some((m, value.as_mut()?)))
    }

    /// What `of` makes of the values there are.
    ///
    /// # Errors
    /// The first that `of` returns.
    pub fn try_map<U, E>(self, mut of: impl FnMut(Modality, T) -> Result<U, E>) -> Result<Per<U>, E> {
        Ok(Per {
            video: self.video.map(|v| of(Modality::Video, v)).transpose()?,
            audio: self.audio.map(|v| of(Modality::Audio, v)).transpose()?,
        })
    }
}
