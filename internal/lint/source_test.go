package lint

import (
	"go/ast"
	"go/token"
	"path"
	"regexp"
	"strings"
	"testing"
)

// maxLines is the ceiling for a source file: what one can still find one's way in.
const maxLines = 800

func TestFileSize(t *testing.T) {
	for _, f := range repository(t) {
		if !f.generated && f.lines > maxLines {
			t.Errorf("%s has %d lines; split it by theme before %d", f.path, f.lines, maxLines)
		}
	}
}

// ban is a call, or a mark in the text, that has a better place.
type ban struct {
	pkg, name string
	instead   string
	allowed   func(f *file) bool
}

var bans = []ban{
	{"time", "Sleep", "wait for the event: a channel, a Loop's After, a deadline", never},
	{"time", "Tick", "use a Loop's After, or time.NewTicker in a shell", never},
	{"time", "Now", "ask a clock.Clock (internal/clock), so that the simulator can answer", func(f *file) bool {
		return f.dir == "internal/clock" || measures(f)
	}},
	{"time", "Since", "ask a clock.Clock (internal/clock)", measures},
	{"time", "Until", "ask a clock.Clock (internal/clock)", measures},
	{"math/rand", "*", "use math/rand/v2 with a source that is passed in", never},
	{"io/ioutil", "*", "use io and os", never},
	{"log", "*", "use log/slog", never},
	{"reflect", "*", "write the codec or the comparison out", func(f *file) bool { return f.test }},
}

func never(*file) bool { return false }

// measures tells whether the file's work is to measure real time around real
// processes, or to set a socket's deadline, which only the calendar clock does.
func measures(f *file) bool {
	return f.test || top(f.dir) == "test" || f.dir == "bench" || f.dir == "cmd/firn" ||
		strings.HasPrefix(path.Base(f.path), "shell") || f.dir == "nbd" || f.dir == "nbd/client" || f.dir == "iscsi"
}

func TestBannedCalls(t *testing.T) {
	for _, f := range repository(t) {
		if f.generated {
			continue
		}
		for _, b := range bans {
			name := f.importName(b.pkg)
			if name == "" || b.allowed(f) {
				continue
			}
			if b.name == "*" {
				t.Errorf("%s: import of %s: %s", f.path, b.pkg, b.instead)
				continue
			}
			ast.Inspect(f.ast, func(n ast.Node) bool {
				if s, ok := n.(*ast.SelectorExpr); ok && s.Sel.Name == b.name {
					if x, ok := s.X.(*ast.Ident); ok && x.Name == name {
						t.Errorf("%s: %s.%s: %s", f.at(s.Pos()), b.pkg, b.name, b.instead)
					}
				}
				return true
			})
		}
	}
}

// marks of unfinished work. The pattern is split so that this file passes.
var marks = regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME|XX` + `X|HA` + `CK)\b|not (yet )?imple` + `mented|for n` + `ow\b|place` + `holder|t\.Sk` + `ip`)

func TestNothingUnfinished(t *testing.T) {
	for _, f := range repository(t) {
		if f.generated {
			continue
		}
		for i, line := range strings.Split(string(f.source), "\n") {
			if m := marks.FindString(line); m != "" {
				t.Errorf("%s:%d: %q: finish it, or record why it stands in docs/decisions", f.path, i+1, m)
			}
		}
	}
}

func TestPackageDocs(t *testing.T) {
	docs := map[string]bool{}
	for _, f := range repository(t) {
		if f.test {
			continue
		}
		documented := f.ast.Doc != nil && (f.ast.Name.Name == "main" || strings.HasPrefix(f.ast.Doc.Text(), "Package "+f.ast.Name.Name))
		docs[f.dir] = docs[f.dir] || documented
	}
	for dir, ok := range docs {
		if !ok {
			t.Errorf("%s: no file has a package comment that says what the package is", dir)
		}
	}
}

// TestExportedDocs asks for a comment on everything exported that others can
// see. In a group of constants or of types, one comment at its head will do.
func TestExportedDocs(t *testing.T) {
	for _, f := range repository(t) {
		if f.test || f.generated || f.ast.Name.Name == "main" {
			continue
		}
		for _, d := range f.ast.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Name.IsExported() && d.Doc == nil && receiverExported(d) && !selfEvident(d) {
					t.Errorf("%s: %s has no comment", f.at(d.Pos()), d.Name.Name)
				}
			case *ast.GenDecl:
				undocumentedSpecs(d, func(name *ast.Ident) {
					t.Errorf("%s: %s has no comment", f.at(name.Pos()), name.Name)
				})
			}
		}
	}
}

func receiverExported(d *ast.FuncDecl) bool {
	if d.Recv == nil || len(d.Recv.List) == 0 {
		return true
	}
	t := d.Recv.List[0].Type
	for {
		switch x := t.(type) {
		case *ast.StarExpr:
			t = x.X
			continue
		case *ast.IndexExpr:
			t = x.X
			continue
		case *ast.Ident:
			return x.IsExported()
		}
		return true
	}
}

// selfEvident are methods whose contract the standard library states.
func selfEvident(d *ast.FuncDecl) bool {
	if d.Recv == nil {
		return false
	}
	switch d.Name.Name {
	case "String", "Error", "Unwrap", "Is", "Len", "Less", "Swap", "Close":
		return true
	}
	return false
}

func undocumentedSpecs(d *ast.GenDecl, report func(*ast.Ident)) {
	if d.Tok == token.IMPORT || d.Doc != nil {
		return
	}
	headed := false
	for _, s := range d.Specs {
		switch s := s.(type) {
		case *ast.TypeSpec:
			if s.Name.IsExported() && s.Doc == nil && s.Comment == nil {
				report(s.Name)
			}
		case *ast.ValueSpec:
			// A typed constant is documented by its type.
			headed = headed || s.Doc != nil || s.Comment != nil || d.Tok == token.CONST && s.Type != nil
			for _, name := range s.Names {
				if name.IsExported() && !headed {
					report(name)
				}
			}
		}
	}
}
