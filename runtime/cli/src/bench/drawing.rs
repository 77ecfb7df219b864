//! What pages of measurements are drawn with: HTML and SVG that need nothing else.

/// Width of pictures in pixels.
pub const WIDTH: f64 = 1040.0;

/// Colour of what is limited by memory, and by arithmetic.
pub const MEMORY: &str = "#0f9d8a";
/// See [`MEMORY`].
pub const ARITHMETIC: &str = "#5b5bd6";

/// Colour of words that matter, and of others.
pub const INK: &str = "#1c2430";
/// See [`INK`].
pub const GREY: &str = "#5a6472";

const STYLE: &str = "\
body{font:15px/1.5 system-ui,'DejaVu Sans',sans-serif;color:#1c2430;background:#f6f7f9;margin:0}\
main{max-width:1104px;margin:0 auto;padding:28px 32px 64px}\
h1{font-size:26px;margin:0 0 4px}h2{font-size:18px;margin:36px 0 4px}p{margin:4px 0 12px;color:#5a6472}\
.card{background:#fff;border:1px solid #e3e7ec;border-radius:12px;padding:20px 16px;overflow-x:auto}\
.tiles{display:flex;gap:14px;flex-wrap:wrap;margin:20px 0 0}\
.tile{background:#fff;border:1px solid #e3e7ec;border-radius:12px;padding:12px 18px;flex:1;min-width:150px}\
.tile b{display:block;font-size:22px;font-weight:600}.tile span{color:#5a6472;font-size:13px}\
code{font-size:12.5px;color:#3b4452}\
svg{display:block;font:12.5px system-ui,'DejaVu Sans',sans-serif}\
.key{display:inline-block;width:11px;height:11px;border-radius:3px;margin:0 5px 0 14px;vertical-align:-1px}\
.keys{white-space:nowrap}";

/// The beginning of a page up to its first section: a title, lines below it, and numbers with what they are.
pub fn head(title: &str, lines: &[String], tiles: &[(String, String)]) -> String {
    let lines: Vec<String> = lines.iter().map(|line| escape(line)).collect();
    let tiles: String = tiles
        .iter()
        .map(|(v, what)| format!("<div class=\"tile\"><b>{}</b><span>{}</span></div>", escape(v), escape(what)))
        .collect();
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>{0}</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head><body><main>\
         <h1>{0}</h1><p>{1}</p><div class=\"tiles\">{tiles}</div>",
        escape(title),
        lines.join("<br>"),
    )
}

/// The end of a page, with the command that made it.
pub fn foot(command: &str) -> String {
    format!("<p><code>{}</code></p></main></body></html>\n", escape(command))
}

/// A picture with a title and words, which are HTML.
pub fn section(title: &str, text: &str, picture: &str) -> String {
    format!("<h2>{}</h2><p>{text}</p><div class=\"card\">{picture}</div>", escape(title))
}

/// What a colour means.
pub fn key(colour: &str, text: &str) -> String {
    format!("<span class=\"keys\"><span class=\"key\" style=\"background:{colour}\"></span>{}</span> ", escape(text))
}

/// A picture of this height.
pub fn svg(height: f64, body: &str) -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" height=\"{height:.0}\">{body}</svg>")
}

/// A bar to the right.
pub fn bar(x: f64, y: f64, width: f64, height: f64, colour: &str) -> String {
    let width = width.max(1.0);
    format!("<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" rx=\"3\" fill=\"{colour}\"/>")
}

/// Words whose `anchor` (`start`, `middle`, `end`) is at `x`.
pub fn label(x: f64, y: f64, anchor: &str, weight: &str, colour: &str, text: &str) -> String {
    format!(
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-weight=\"{weight}\" fill=\"{colour}\">{}</text>",
        escape(text)
    )
}

/// Marks of a bar that ends at 100 %, with lines down to `bottom`.
pub fn quarters(x: f64, room: f64, bottom: f64) -> String {
    let quarter = |q: i32| {
        let at = x + room * f64::from(q) / 4.0;
        let line = format!("<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"18\" y2=\"{bottom}\" stroke=\"#eceff3\"/>");
        line + &label(at, 12.0, "middle", "400", GREY, &format!("{} %", 25 * q))
    };
    (0..=4).map(quarter).collect()
}

/// Text with its end cut off if it is longer than that.
pub fn shortened(text: &str, most: usize) -> String {
    if text.chars().count() <= most { text.into() } else { text.chars().take(most - 1).chain(['…']).collect() }
}

/// Text as HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// `1.5 TFLOP` and the like.
pub fn operations(flops: f64) -> String {
    let (value, unit) = match flops {
        f if f >= 1e12 => (f / 1e12, "TFLOP"),
        f if f >= 1e9 => (f / 1e9, "GFLOP"),
        f => (f / 1e6, "MFLOP"),
    };
    format!("{} {unit}", super::figure(value))
}

/// The words of a picture that do not fit into it: for tests.
#[doc(hidden)]
pub fn outside(page: &str) -> Vec<String> {
    let mut found = Vec::new();
    for text in page.split("<text ").skip(1) {
        let (attributes, rest) = text.split_once('>').unwrap_or_default();
        let content = rest.split("</text>").next().unwrap_or_default();
        let of = |name: &str| {
            let (_, value) = attributes.split_once(&format!("{name}=\"")).unwrap_or_default();
            value.split('"').next().unwrap_or_default()
        };
        // Letters are about half as wide as they are high.
        let width = 6.4 * content.chars().count() as f64;
        let x: f64 = of("x").parse().unwrap_or(f64::NAN);
        let from = match of("text-anchor") {
            "start" => x,
            "end" => x - width,
            _ => x - width / 2.0,
        };
        if !(from >= 0.0 && from + width <= WIDTH) {
            found.push(content.to_string());
        }
    }
    found
}
