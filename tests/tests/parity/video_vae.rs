//! video_vae
