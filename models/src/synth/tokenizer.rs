//! A small tokenizer in the format of Gemma's: byte-fallback BPE, spaces as U+2581, special tokens at their real ids, but
//! for those of images, which are beyond a small vocabulary.
//!
//! It is trained here, from the few sentences below, so that prompts become tokens of all kinds: whole words, pieces,
//! characters, and bytes for what the vocabulary lacks.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// Written for this file. Word counts decide the merges.
const SENTENCES: &str = "\
    a cat walks slowly along the wall in the warm evening light while the wind moves the leaves
    the camera follows a woman who opens the door and looks at the sea, waves are heard in the distance
    slow motion close-up of rain falling on a red car at night, the sound of water and a quiet engine
    two people sit at a table and talk, one of them laughs, music plays in the background
    a small boat on a lake in the morning, birds fly over the water and sing
    the man says: \"it is time to go\" and the light of the lamp goes out
    snow falls on the street of an old city, people walk with the sound of steps in the snow
    a blurry, distorted video of low quality with static noise and jittery motion";

/// Number of trained merges.
const MERGES: usize = 240;

/// How Gemma writes a space.
const SPACE: &str = "\u{2581}";

/// Longest run of spaces or newlines that is one token.
const LONGEST_RUN: usize = 5;

const SPECIAL: [(&str, u64); 7] = [
    ("<pad>", 0),
    ("<eos>", 1),
    ("<bos>", 2),
    ("<unk>", 3),
    ("<mask>", 4),
    ("<start_of_turn>", 105),
    ("<end_of_turn>", 106),
];

/// Beginning of an image, each of its soft tokens, and end.
pub(super) const IMAGE: [(&str, u64); 3] =
    [("<start_of_image>", 102), ("<image_soft_token>", 103), ("<end_of_image>", 104)];

/// The files of a tokenizer, and the number of rows that an embedding needs for it.
pub struct Tokenizer {
    /// `(file name, content)`.
    pub files: Vec<(&'static str, Value)>,
    /// Size of the vocabulary.
    pub vocabulary: usize,
}

/// Makes the tokenizer. Always the same one.
pub fn tokenizer() -> Tokenizer {
    let mut vocabulary: Vec<String> =
        ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]"].map(String::from).to_vec();
    vocabulary.extend((0..96).map(|i| format!("<unused{i}>")));
    vocabulary.extend(IMAGE.map(|(name, _)| name.into()));
    vocabulary.extend(["<start_of_turn>", "<end_of_turn>"].map(String::from));
    vocabulary.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    vocabulary.push("\n".into());
    vocabulary.push(SPACE.into());
    vocabulary.extend(('!'..='~').map(String::from));

    let mut merges = runs(SPACE);
    merges.extend(runs("\n"));
    merges.extend(train());
    let mut ids: BTreeMap<String, usize> = vocabulary.into_iter().enumerate().map(|(id, token)| (token, id)).collect();
    for (left, right) in &merges {
        let id = ids.len();
        ids.entry(format!("{left}{right}")).or_insert(id);
    }
    let vocabulary = ids.len();
    let files = vec![
        ("tokenizer.json", tokenizer_json(&ids, &merges)),
        ("tokenizer_config.json", tokenizer_config()),
        ("special_tokens_map.json", names()),
    ];
    Tokenizer { files, vocabulary }
}

/// Merges that make runs of `unit` one token.
fn runs(unit: &str) -> Vec<(String, String)> {
    let pairs = (2..=LONGEST_RUN).flat_map(|total| (1..total).rev().map(move |left| (left, total - left)));
    pairs.map(|(left, right)| (unit.repeat(left), unit.repeat(right))).collect()
}

/// Byte-pair merges inside words, most frequent first, ties in alphabetical order.
fn train() -> Vec<(String, String)> {
    let mut words: BTreeMap<Vec<String>, usize> = BTreeMap::new();
    for word in SENTENCES.split_whitespace() {
        let letters = std::iter::once(SPACE.to_string()).chain(word.chars().map(String::from));
        *words.entry(letters.collect()).or_default() += 1;
    }
    let mut merges = Vec::new();
    while merges.len() < MERGES {
        let mut pairs: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        for (word, count) in &words {
            for pair in word.windows(2) {
                *pairs.entry((&pair[0], &pair[1])).or_default() += count;
            }
        }
        // The map is sorted, and only a strictly larger count replaces a candidate.
        let best = pairs.into_iter().reduce(|best, next| if next.1 > best.1 { next } else { best });
        let Some(((left, right), _)) = best else { break };
        let (left, right) = (left.to_string(), right.to_string());
        words = words.into_iter().map(|(word, count)| (merged(&word, &left, &right), count)).collect();
        merges.push((left, right));
    }
    merges
}

/// `word` with every pair `left right` joined.
fn merged(word: &[String], left: &str, right: &str) -> Vec<String> {
    let mut out: Vec<String> = Vec::with_capacity(word.len());
    let mut i = 0;
    while i < word.len() {
        if i + 1 < word.len() && word[i] == left && word[i + 1] == right {
            out.push(format!("{left}{right}"));
            i += 2;
        } else {
            out.push(word[i].clone());
            i += 1;
        }
    }
    out
}

fn tokenizer_json(ids: &BTreeMap<String, usize>, merges: &[(String, String)]) -> Value {
    let token = |&(content, id): &(&str, u64)| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": true })
    };
    let added: Vec<Value> = SPECIAL.iter().chain(&IMAGE).map(token).collect();
    let vocabulary: Map<String, Value> = ids.iter().map(|(token, id)| (token.clone(), json!(id))).collect();
    let bos = |kind: u8| json!({ "SpecialToken": { "id": "<bos>", "type_id": kind } });
    let text = |name: &str, kind: u8| json!({ "Sequence": { "id": name, "type_id": kind } });
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added,
        "normalizer": { "type": "Replace", "pattern": { "String": " " }, "content": SPACE },
        "pre_tokenizer": { "type": "Split", "pattern": { "String": " " }, "behavior": "MergedWithPrevious", "invert": false },
        "post_processor": {
            "type": "TemplateProcessing", "single": [bos(0), text("A", 0)], "pair": [bos(0), text("A", 0), bos(1), text("B", 1)],
            "special_tokens": { "<bos>": { "id": "<bos>", "ids": [2], "tokens": ["<bos>"] } },
        },
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": SPACE }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
        ] },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary, "merges": merges.iter().map(|(l, r)| json!([l, r])).collect::<Vec<_>>(),
        },
    })
}

fn names() -> Value {
    json!({ "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>" })
}

fn tokenizer_config() -> Value {
    let added: Map<String, Value> = (SPECIAL.iter().chain(&IMAGE))
        .map(|(content, id)| {
            let token = json!({ "content": content, "lstrip": false, "normalized": false, "rstrip": false,
                                "single_word": false, "special": true });
            (id.to_string(), token)
        })
        .collect();
    let mut config = names();
    for (key, (name, _)) in ["boi_token", "image_token", "eoi_token"].iter().zip(IMAGE) {
        config[*key] = json!(name);
    }
    config["add_bos_token"] = json!(true);
    config["add_eos_token"] = json!(false);
    config["added_tokens_decoder"] = Value::Object(added);
    config["clean_up_tokenization_spaces"] = json!(false);
    config["spaces_between_special_tokens"] = json!(false);
    config["tokenizer_class"] = json!("GemmaTokenizer");
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_dense_and_merges_are_in_the_vocabulary() {
        let made = tokenizer();
        let model = &made.files[0].1["model"];
        let vocabulary = model["vocab"].as_object().unwrap();
        let mut ids: Vec<u64> = vocabulary.values().filter_map(Value::as_u64).collect();
        ids.sort_unstable();
        assert_eq!(ids, (0..made.vocabulary as u64).collect::<Vec<_>>());
        for (token, id) in SPECIAL.into_iter().chain(IMAGE) {
            assert_eq!(vocabulary[token], id);
        }
        for merge in model["merges"].as_array().unwrap() {
            let [left, right] = [0, 1].map(|i| merge[i].as_str().unwrap());
            for token in [left, right, &format!("{left}{right}")] {
                assert!(vocabulary.contains_key(token), "{token}");
            }
        }
        assert!(vocabulary.contains_key("\u{2581}the"));
    }
}
