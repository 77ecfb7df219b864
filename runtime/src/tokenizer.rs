//! Prompts to token ids: Hugging Face `tokenizer.json`, as the text encoders of LTX models expect it.
//!
//! # Easy to get wrong
//! - Prompts are stripped, encoded with special tokens, and cut on the right to 1024 tokens, `<bos>` included.
//! - There is exactly one `<bos>` in front: Gemma 3's tokenizer adds it, Gemma 4's does not.
//! - Pads stand on the **left**. No end-of-sequence token; a chat template only where Gemma 3 writes ([`Tokenizer::encode_turn`]).
//! - Python's `strip` also removes the separators U+001C to U+001F, which Rust's `trim` keeps.
//!
//! Source: ltx_core/text_encoders/gemma/tokenizer (Lightricks/LTX-2, 1.2.0); spec/text-encoder §1.

use std::path::{Path, PathBuf};

use ltxc_ir::plan::ImageTokens;
use serde_json::Value;

use crate::contain::contain;

/// Tokens of a context, and the most a prompt may have.
///
/// Source: ltx_core/text_encoders/gemma, `LTXVGemmaTokenizer(max_length=1024)` (Lightricks/LTX-2, 1.2.0).
pub const CONTEXT_TOKENS: usize = 1024;

/// Problems with a tokenizer or a prompt.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the documentation
pub enum TokenizerError {
    #[error("tokenizer `{path}` cannot be read")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("`{path}` is not a Hugging Face tokenizer: {problem}")]
    Format { path: PathBuf, problem: String },
    #[error("the tokenizer has no token `{name}`, which it should use as {role}")]
    Token { name: String, role: &'static str },
    #[error(
        "the tokenizer has no token {id}, which stands for an image; use the files of the text encoder as published, or \
         enhance the prompt without the image"
    )]
    ImageToken { id: u32 },
    #[error("the prompt cannot be encoded: {problem}")]
    Encode { problem: String },
}

/// A tokenizer of a text encoder.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: i32,
    pad: i32,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a Hugging Face folder, and the names of special tokens from `tokenizer_config.json`
    /// beside it, if there.
    ///
    /// # Errors
    /// A file that cannot be read or is of another format, and special tokens that it does not have.
    pub fn from_folder(folder: &Path) -> Result<Tokenizer, TokenizerError> {
        let path = folder.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| TokenizerError::Read { path: path.clone(), source })?;
        let config_path = folder.join("tokenizer_config.json");
        let config = match std::fs::read(&config_path) {
            Ok(bytes) => Some(bytes),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(source) => return Err(TokenizerError::Read { path: config_path, source }),
        };
        Tokenizer::parse(&path, &bytes, config.as_deref().map(|bytes| (config_path.as_path(), bytes)))
    }

    /// Reads the bytes of a `tokenizer.json` and of its `tokenizer_config.json`, as an LTX-2.5 text encoder file carries
    /// them.
    ///
    /// # Errors
    /// Bytes of another format, and special tokens that they do not have.
    pub fn from_bytes(tokenizer: &[u8], config: Option<&[u8]>) -> Result<Tokenizer, TokenizerError> {
        let config = config.map(|bytes| (Path::new("tokenizer_config.json"), bytes));
        Tokenizer::parse(Path::new("tokenizer.json"), tokenizer, config)
    }

    fn parse(path: &Path, tokenizer: &[u8], config: Option<(&Path, &[u8])>) -> Result<Tokenizer, TokenizerError> {
        let format = |path: &Path, problem: String| TokenizerError::Format { path: path.into(), problem };
        let mut inner = library(|| tokenizers::Tokenizer::from_bytes(tokenizer)).map_err(|e| format(path, e))?;
        // Length and padding are ours, whatever was in force when the file was saved.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| format(path, e.to_string()))?;
        let config: Value = match config {
            Some((path, bytes)) => serde_json::from_slice(bytes).map_err(|e| format(path, e.to_string()))?,
            None => Value::Null,
        };
        let bos = required(&inner, special_token(&config, "bos_token").unwrap_or("<bos>"), "beginning of the prompt")?;
        let pad = match special_token(&config, "pad_token") {
            Some(name) => required(&inner, name, "padding")?,
            None => match id_of(&inner, "<pad>") {
                Some(id) => id,
                None => required(&inner, special_token(&config, "eos_token").unwrap_or("<eos>"), "padding")?,
            },
        };
        // Some faults, such as templates with tokens that are not there, show where text is encoded.
        library(|| inner.encode("a", true)).map_err(|e| format(path, e))?;
        Ok(Tokenizer { inner, bos, pad })
    }

    /// Encodes a prompt: at least one token, at most [`CONTEXT_TOKENS`].
    ///
    /// # Errors
    /// A prompt with parts the tokenizer has no token for.
    pub fn encode(&self, prompt: &str) -> Result<Prompt, TokenizerError> {
        let text = prompt.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c));
        let mut ids = self.ids(text)?;
        let cut = ids.split_off(ids.len().min(CONTEXT_TOKENS));
        Ok(Prompt { ids, pad: self.pad, cut })
    }

    /// Encodes what a user says to an instruct model, up to where the model's answer begins: `<bos>` first, once.
    ///
    /// # Errors
    /// A tokenizer without the tokens of a conversation, or a text with parts it has no token for.
    ///
    /// Source: the chat template of google/gemma-3-12b-it; spec/text-encoder §6.
    pub fn encode_turn(&self, text: &str) -> Result<Turn, TokenizerError> {
        let [start, end] = [("<start_of_turn>", "start of a turn"), ("<end_of_turn>", "end of a turn")];
        required(&self.inner, start.0, start.1)?;
        let stop = required(&self.inner, end.0, end.1)?;
        let text = format!("{0}user\n{1}{2}\n{0}model\n", start.0, text.trim(), end.0);
        let stops = [Some(stop), id_of(&self.inner, "<eos>")].into_iter().flatten().collect();
        Ok(Turn { ids: self.ids(&text)?, pad: self.pad, stops })
    }

    /// What stands for an image in the text of a turn: `count` soft tokens between marks and empty lines.
    ///
    /// # Errors
    /// A tokenizer that does not have these tokens.
    ///
    /// Source: transformers `Gemma3Processor` (4.57).
    pub fn image_text(&self, tokens: ImageTokens, count: usize) -> Result<String, TokenizerError> {
        let name = |id: u32| self.inner.id_to_token(id).ok_or(TokenizerError::ImageToken { id });
        let (begin, soft, end) = (name(tokens.begin)?, name(tokens.soft)?, name(tokens.end)?);
        Ok(format!("\n\n{begin}{}{end}\n\n", soft.repeat(count)))
    }

    /// `text` as tokens, with one `<bos>` in front.
    fn ids(&self, text: &str) -> Result<Vec<i32>, TokenizerError> {
        let problem = |problem: String| TokenizerError::Encode { problem };
        let encoding = library(|| self.inner.encode(text, true)).map_err(problem)?;
        let ids: Result<Vec<i32>, _> = encoding.get_ids().iter().map(|&id| i32::try_from(id)).collect();
        let ids = ids.map_err(|e| problem(e.to_string()))?;
        let spoken = ids.iter().skip_while(|&&id| id == self.bos).copied();
        Ok(std::iter::once(self.bos).chain(spoken).collect())
    }

    /// The text of `ids`, special tokens included: for messages, such as what was cut off a prompt.
    ///
    /// # Errors
    /// Ids that the tokenizer cannot decode.
    pub fn decode(&self, ids: &[i32]) -> Result<String, TokenizerError> {
        self.text(ids, false)
    }

    /// The text of `ids` without special tokens: what a model has written.
    ///
    /// # Errors
    /// Ids that the tokenizer cannot decode.
    pub fn decode_written(&self, ids: &[i32]) -> Result<String, TokenizerError> {
        self.text(ids, true)
    }

    fn text(&self, ids: &[i32], skips_special: bool) -> Result<String, TokenizerError> {
        let ids: Vec<u32> = ids.iter().filter_map(|&id| u32::try_from(id).ok()).collect();
        library(|| self.inner.decode(&ids, skips_special)).map_err(|problem| TokenizerError::Encode { problem })
    }
}

/// What the library of tokenizers gives, which panics for many a damaged file.
fn library<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match contain(work) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => Err(format!("it is damaged ({panic})")),
    }
}

/// A turn of a user, encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Its tokens, `<bos>` first, up to where the answer begins.
    pub ids: Vec<i32>,
    /// The token to pad with, in front.
    pub pad: i32,
    /// Tokens that end the answer.
    pub stops: Vec<i32>,
}

/// Name of a special token in `tokenizer_config.json`: a string, or an object with `content`.
fn special_token<'a>(config: &'a Value, key: &str) -> Option<&'a str> {
    let token = config.get(key)?;
    token.as_str().or_else(|| token.get("content")?.as_str())
}

fn id_of(tokenizer: &tokenizers::Tokenizer, name: &str) -> Option<i32> {
    tokenizer.token_to_id(name).and_then(|id| i32::try_from(id).ok())
}

fn required(tokenizer: &tokenizers::Tokenizer, name: &str, role: &'static str) -> Result<i32, TokenizerError> {
    id_of(tokenizer, name).ok_or_else(|| TokenizerError::Token { name: name.into(), role })
}

/// An encoded prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    ids: Vec<i32>,
    pad: i32,
    cut: Vec<i32>,
}

impl Prompt {
    /// The real tokens, `<bos>` first: 1 to [`CONTEXT_TOKENS`] of them.
    pub fn ids(&self) -> &[i32] {
        &self.ids
    }

    /// The tokens that were cut off the end; worth a warning if there are any (see [`Tokenizer::decode`]).
    pub fn cut(&self) -> &[i32] {
        &self.cut
    }

    /// The smallest of `buckets` that holds the prompt.
    pub fn bucket(&self, buckets: impl IntoIterator<Item = usize>) -> Option<usize> {
        buckets.into_iter().filter(|&slots| slots >= self.ids.len()).min()
    }

    /// The inputs of the program that encodes text in `slots` token slots with `registers` registers; `None` if the
    /// prompt does not fit or there are no registers.
    pub fn inputs(&self, slots: usize, registers: usize) -> Option<PromptInputs> {
        let n = self.ids.len();
        let pads = slots.checked_sub(n)?;
        if slots > CONTEXT_TOKENS || !(1..=CONTEXT_TOKENS).contains(&registers) {
            return None;
        }
        let ids = std::iter::repeat_n(self.pad, pads).chain(self.ids.iter().copied()).collect();
        let valid = (0..slots).map(|slot| if slot < pads { 0.0 } else { 1.0 }).collect();
        // Rows are below 2048, which an i32 holds.
        let row = |p: usize| (if p < n { pads + p } else { slots + p % registers }) as i32;
        Some(PromptInputs { ids, valid, place: (0..CONTEXT_TOKENS).map(row).collect() })
    }
}

/// A prompt as the text encoding program takes it.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptInputs {
    /// Token ids, pads on the left; one per slot.
    pub ids: Vec<i32>,
    /// 1 for real tokens, 0 for pads; one per slot.
    pub valid: Vec<f32>,
    /// For each of the [`CONTEXT_TOKENS`] places its row among the slots and the registers behind them: real tokens
    /// first, then the register of the place's own number.
    pub place: Vec<i32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Byte-level toy: `a`, `b`, and special tokens; `bos` is added by the post-processor if `adds_bos`.
    fn toy(adds_bos: bool, special: &[&str]) -> Vec<u8> {
        let names: Vec<&str> = special.iter().copied().chain(["a", "b", " "]).collect();
        let vocab: serde_json::Map<String, Value> =
            names.iter().enumerate().map(|(i, n)| (n.to_string(), i.into())).collect();
        let added: Vec<Value> = (special.iter().enumerate())
            .map(|(i, name)| {
                serde_json::json!({
                    "id": i, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true,
                })
            })
            .collect();
        let bos = special.iter().position(|&name| name == "<bos>");
        let post = adds_bos.then(|| {
            serde_json::json!({
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<bos>": {"id": "<bos>", "ids": [bos], "tokens": ["<bos>"]}},
            })
        });
        let json = serde_json::json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
            "padding": null, "added_tokens": added, "normalizer": null, "pre_tokenizer": null,
            "post_processor": post, "decoder": null,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [],
            },
        });
        serde_json::to_vec(&json).expect("plain JSON")
    }

    const SPECIAL: [&str; 3] = ["<pad>", "<eos>", "<bos>"];

    #[track_caller]
    fn check(adds_bos: bool, prompt: &str, ids: &[i32]) {
        let tokenizer = Tokenizer::from_bytes(&toy(adds_bos, &SPECIAL), None).expect("a tokenizer");
        assert_eq!(tokenizer.encode(prompt).expect("encodes").ids(), ids);
    }

    #[test]
    fn there_is_exactly_one_bos() {
        for adds_bos in [true, false] {
            check(adds_bos, "", &[2]);
            check(adds_bos, "ab", &[2, 3, 4]);
            check(adds_bos, "<bos>ab", &[2, 3, 4]);
        }
    }

    #[test]
    fn prompts_are_stripped_like_in_python() {
        check(true, " \n\u{a0}\u{1c}a b\u{3000}\u{1f}\t", &[2, 3, 5, 4]);
    }

    #[test]
    fn stored_truncation_is_ignored_and_long_prompts_are_cut() {
        let tokenizer = Tokenizer::from_bytes(&toy(true, &SPECIAL), None).expect("a tokenizer");
        let prompt = tokenizer.encode(&"ab".repeat(600)).expect("encodes");
        assert_eq!((prompt.ids().len(), prompt.cut().len()), (1024, 177));
        assert_eq!(&prompt.ids()[1020..], [4, 3, 4, 3]);
    }

    #[test]
    fn inputs_are_padded_on_the_left() {
        let prompt = Prompt { ids: vec![2, 3, 4], pad: 7, cut: Vec::new() };
        let inputs = prompt.inputs(5, 4).expect("fits");
        assert_eq!(inputs.ids, [7, 7, 2, 3, 4]);
        assert_eq!(inputs.valid, [0.0, 0.0, 1.0, 1.0, 1.0]);
        assert_eq!(inputs.place[..9], [2, 3, 4, 5 + 3, 5, 6, 7, 8, 5]);
        assert_eq!(inputs.place[1023], 5 + 3);
        assert_eq!((prompt.inputs(2, 4), prompt.inputs(1025, 4), prompt.inputs(5, 0)), (None, None, None));
        assert_eq!((prompt.bucket([64, 32, 2]), prompt.bucket([2])), (Some(32), None));
    }

    #[test]
    fn pad_falls_back_to_eos_and_names_come_from_the_config() {
        let tokenizer = Tokenizer::from_bytes(&toy(false, &["<eos>", "<bos>"]), None).expect("a tokenizer");
        assert_eq!((tokenizer.pad, tokenizer.bos), (0, 1));
        let config = br#"{"bos_token": {"content": "<s>"}, "pad_token": "<blank>"}"#;
        let tokenizer = Tokenizer::from_bytes(&toy(false, &["<s>", "<blank>"]), Some(config)).expect("a tokenizer");
        assert_eq!((tokenizer.pad, tokenizer.bos), (1, 0));
    }

    #[test]
    fn a_turn_ends_where_the_answer_begins() {
        let special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"];
        let tokenizer = Tokenizer::from_bytes(&toy(true, &special), None).expect("a tokenizer");
        let turn = tokenizer.encode_turn(" ab\n").expect("encodes");
        // The toy has no tokens for `user`, `model` and newlines, which it leaves out.
        assert_eq!(turn, Turn { ids: vec![2, 3, 5, 6, 4, 3], pad: 0, stops: vec![4, 1] });
        assert_eq!(tokenizer.decode_written(&[5, 1, 6, 4]).expect("decodes").replace(' ', ""), "ab");
        let tokens = |soft| ImageTokens { begin: 3, soft, end: 4 };
        let text = tokenizer.image_text(tokens(1), 2).expect("there are such tokens");
        assert_eq!(text, "\n\n<start_of_turn><eos><eos><end_of_turn>\n\n");
        let problem = tokenizer.image_text(tokens(99), 2).expect_err("there is no such token").to_string();
        assert!(problem.contains("no token 99"), "{problem}");
        let without = Tokenizer::from_bytes(&toy(true, &SPECIAL), None).expect("a tokenizer");
        let problem = without.encode_turn("ab").expect_err("there are no turns").to_string();
        assert!(problem.contains("no token `<start_of_turn>`"), "{problem}");
    }

    #[test]
    fn what_is_no_tokenizer_is_an_error() {
        let message = |r: Result<Tokenizer, TokenizerError>| r.err().map(|e| e.to_string()).unwrap_or_default();
        let absent = Tokenizer::from_folder(Path::new("no such folder"));
        assert!(message(absent).contains("cannot be read"));
        assert!(message(Tokenizer::from_bytes(b"{}", None)).contains("is not a Hugging Face tokenizer"));
        assert!(message(Tokenizer::from_bytes(&[0xff, 0, 1], None)).contains("is not a Hugging Face tokenizer"));
        let cut = br#"{"version": "1.0", "decoder": {"type": "Fuse", "rest": ["#;
        assert!(message(Tokenizer::from_bytes(cut, None)).contains("is not a Hugging Face tokenizer"));
        // Templates with what is not there, on which the library panics.
        let toy_text = String::from_utf8(toy(true, &SPECIAL)).expect("text");
        for (from, to) in [(r#"{"<bos>":{"#, r#"{"<b>":{"#), (r#""id":"A""#, r#""id":"B""#)] {
            assert!(toy_text.contains(from));
            let problem = message(Tokenizer::from_bytes(toy_text.replace(from, to).as_bytes(), None));
            assert!(problem.contains("is not a Hugging Face tokenizer: it is damaged ("), "{problem}");
        }
        assert!(message(Tokenizer::from_bytes(&toy(false, &["<pad>"]), None)).contains("no token `<bos>`"));
        let config = message(Tokenizer::from_bytes(&toy(false, &SPECIAL), Some(b"nonsense")));
        assert!(config.contains("tokenizer_config.json"));
    }
}
