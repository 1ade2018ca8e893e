// Package lint holds the rules of docs/architecture.md as tests: who may import
// whom, what a single-threaded core must not contain, which calls are banned
// and what takes their place, that every package and exported name is
// documented, and that files stay small. It reads the source only, so it runs
// in a second: `go test ./internal/lint`.
package lint

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
)

// Module is the import path of the repository.
const Module = "firn.io/firn"

// file is one parsed Go source file.
type file struct {
	path      string // relative to the repository, with slashes
	dir       string // "." for the root
	test      bool
	generated bool
	lines     int
	ast       *ast.File
	fset      *token.FileSet
	source    []byte
}

// at returns "path:line" of a position.
func (f *file) at(p token.Pos) string {
	return f.path + ":" + strconv.Itoa(f.fset.Position(p).Line)
}

// imports returns the import paths of f.
func (f *file) imports() []string {
	var out []string
	for _, i := range f.ast.Imports {
		p, err := strconv.Unquote(i.Path.Value)
		if err == nil {
			out = append(out, p)
		}
	}
	return out
}

// importName returns the name under which f imports path, or "".
func (f *file) importName(importPath string) string {
	for _, i := range f.ast.Imports {
		if p, err := strconv.Unquote(i.Path.Value); err != nil || p != importPath {
			continue
		}
		if i.Name != nil {
			return i.Name.Name
		}
		return path.Base(importPath)
	}
	return ""
}

// load parses every Go file below root. Generated files are kept, so that
// their imports count, and are marked.
func load(root string) ([]*file, error) {
	var files []*file
	fset := token.NewFileSet()
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); p != root && (strings.HasPrefix(name, ".") || name == "testdata" || name == "firn-data") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(p, ".go") {
			return nil
		}
		source, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		tree, err := parser.ParseFile(fset, p, source, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		files = append(files, &file{
			path: rel, dir: path.Dir(rel), test: strings.HasSuffix(rel, "_test.go"),
			generated: ast.IsGenerated(tree), lines: strings.Count(string(source), "\n"),
			ast: tree, fset: fset, source: source,
		})
		return nil
	})
	return files, err
}

// root finds the repository from the working directory of a test.
func root() (string, error) {
	dir, err := os.Getwd()
	for err == nil {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			break
		}
		dir = up
	}
	return "", os.ErrNotExist
}
