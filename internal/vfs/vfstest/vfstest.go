// Package vfstest is the suite that every kind of vfs.FS passes.
package vfstest

import (
	"bytes"
	"errors"
	"io"
	iofs "io/fs"
	"path"
	"slices"
	"testing"
	"unsafe"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/vfs"
)

// Run checks fs below dir, an empty folder.
func Run(t *testing.T, fs vfs.FS, dir string) {
	s := suite{fs, dir}
	t.Run("Files", s.files)
	t.Run("Names", s.names)
	t.Run("Errors", s.errors)
	t.Run("Vector", s.vector)
	t.Run("Direct", s.direct)
	t.Run("Lock", s.lock)
	t.Run("Atomic", s.atomic)
	t.Run("Counters", s.counters)
	t.Run("Space", s.space)
}

type suite struct {
	fs  vfs.FS
	dir string
}

func (s suite) path(name string) string { return path.Join(s.dir, name) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantKind(t *testing.T, err error, k block.Kind) {
	t.Helper()
	if err == nil || block.KindOf(err) != k {
		t.Fatalf("error %v, want one of kind %q", err, k)
	}
}

func (s suite) open(t *testing.T, name string, f vfs.Flags) vfs.File {
	t.Helper()
	file, err := s.fs.Open(s.path(name), f, vfs.ClassOther)
	must(t, err)
	return file
}

func (s suite) files(t *testing.T) {
	f := s.open(t, "file", vfs.Create)
	if _, err := f.WriteAt([]byte("hello"), 3); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 10)
	n, err := f.ReadAt(p, 0)
	if n != 8 || err != io.EOF || !bytes.Equal(p[:n], []byte("\x00\x00\x00hello")) {
		t.Fatalf("read %q, %v", p[:n], err)
	}
	if n, err := f.ReadAt(p, 100); n != 0 || err != io.EOF {
		t.Fatalf("read %d bytes, %v behind the end", n, err)
	}
	must(t, f.Allocate(0, 10000))
	if size, err := f.Size(); err != nil || size != 10000 {
		t.Fatalf("size %d, %v after an allocation to 10000", size, err)
	}
	must(t, f.Allocate(0, 100))
	must(t, f.Truncate(5))
	must(t, f.Truncate(9000))
	big := make([]byte, 9000)
	if n, err := f.ReadAt(big, 0); n != 9000 || err != nil {
		t.Fatalf("read %d, %v", n, err)
	}
	if string(big[:5]) != "\x00\x00\x00he" || !bytes.Equal(big[5:], make([]byte, 8995)) {
		t.Fatal("what was cut off came back when the file grew")
	}
	must(t, f.Sync())
	must(t, f.DropCache())
	must(t, f.Close())
	f = s.open(t, "file", vfs.Truncate)
	if size, _ := f.Size(); size != 0 {
		t.Fatalf("%d bytes in an emptied file", size)
	}
	must(t, f.Close())
}

func (s suite) names(t *testing.T) {
	must(t, s.fs.MkdirAll(s.path("a/b/c")))
	must(t, s.fs.MkdirAll(s.path("a/b/c")))
	for _, name := range []string{"a/z", "a/y", "a/b/x"} {
		must(t, s.open(t, name, vfs.Create|vfs.Exclusive).Close())
	}
	list := func(dir string, want ...string) {
		t.Helper()
		got, err := s.fs.List(s.path(dir))
		if err != nil || !slices.Equal(got, want) {
			t.Fatalf("%s holds %v, %v, want %v", dir, got, err, want)
		}
	}
	list("a", "b", "y", "z")
	must(t, s.fs.Rename(s.path("a/z"), s.path("a/y")))
	list("a", "b", "y")
	must(t, s.fs.Rename(s.path("a/y"), s.path("a/b/y")))
	list("a", "b")
	list("a/b", "c", "x", "y")
	must(t, s.fs.Remove(s.path("a/b/c")))
	must(t, s.fs.SyncDir(s.path("a/b")))
	info, err := s.fs.Stat(s.path("a/b/x"))
	if err != nil || info.IsDir || info.Name != "x" {
		t.Fatalf("%+v, %v", info, err)
	}
	if info, err = s.fs.Stat(s.path("a")); err != nil || !info.IsDir || info.Size != 0 {
		t.Fatalf("%+v, %v", info, err)
	}
	must(t, s.fs.RemoveAll(s.path("a")))
	must(t, s.fs.RemoveAll(s.path("a")))
	_, err = s.fs.Stat(s.path("a"))
	wantKind(t, err, block.NotFound)
}

func (s suite) errors(t *testing.T) {
	_, err := s.fs.Open(s.path("nothing"), 0, vfs.ClassOther)
	wantKind(t, err, block.NotFound)
	if !errors.Is(err, iofs.ErrNotExist) {
		t.Fatalf("%v is not ErrNotExist", err)
	}
	wantKind(t, s.fs.Remove(s.path("nothing")), block.NotFound)
	wantKind(t, s.fs.Rename(s.path("nothing"), s.path("x")), block.NotFound)
	_, err = s.fs.List(s.path("nothing"))
	wantKind(t, err, block.NotFound)
	must(t, s.open(t, "there", vfs.Create).Close())
	_, err = s.fs.Open(s.path("there"), vfs.Create|vfs.Exclusive, vfs.ClassOther)
	wantKind(t, err, block.Exists)
	if !errors.Is(err, iofs.ErrExist) {
		t.Fatalf("%v is not ErrExist", err)
	}
	f := s.open(t, "there", vfs.ReadOnly)
	if _, err := f.WriteAt([]byte("x"), 0); err == nil {
		t.Fatal("a file opened for reading was written")
	}
	must(t, f.Close())
}

func (s suite) vector(t *testing.T) {
	f := s.open(t, "vector", vfs.Create)
	var bufs [][]byte
	var want []byte
	for i := range 3000 { // more than one system call takes
		b := bytes.Repeat([]byte{byte(i)}, i%7)
		bufs = append(bufs, b)
		want = append(want, b...)
	}
	n, err := f.WriteAtv(bufs, 10)
	if err != nil || n != len(want) {
		t.Fatalf("wrote %d of %d: %v", n, len(want), err)
	}
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, 10); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("other bytes came back: %v", err)
	}
	if n, err := f.WriteAtv(nil, 0); n != 0 || err != nil {
		t.Fatalf("wrote %d, %v from nothing", n, err)
	}
	must(t, f.Close())
}

// aligned returns n bytes at an address that direct files take.
func aligned(n int) []byte {
	b := make([]byte, n+vfs.Align)
	skip := int(-uintptr(unsafe.Pointer(&b[0])) & (vfs.Align - 1))
	return b[skip : skip+n]
}

func (s suite) direct(t *testing.T) {
	f := s.open(t, "direct", vfs.Create|vfs.Direct)
	p := aligned(4 * vfs.Align)
	for i := range p {
		p[i] = byte(i * 7)
	}
	if _, err := f.WriteAtv([][]byte{p[:vfs.Align], p[vfs.Align:]}, vfs.Align); err != nil {
		t.Fatal(err)
	}
	must(t, f.Sync())
	must(t, f.DropCache())
	got := aligned(4 * vfs.Align)
	if _, err := f.ReadAt(got, vfs.Align); err != nil || !bytes.Equal(got, p) {
		t.Fatalf("other bytes came back: %v", err)
	}
	must(t, f.Close())
}

func (s suite) lock(t *testing.T) {
	dir := s.path("locked")
	first, err := vfs.Lock(s.fs, dir)
	must(t, err)
	_, err = vfs.Lock(s.fs, dir)
	wantKind(t, err, block.Busy)
	must(t, first.Close())
	second, err := vfs.Lock(s.fs, dir)
	must(t, err)
	must(t, second.Close())
}

func (s suite) atomic(t *testing.T) {
	name := s.path("atomic")
	for _, content := range []string{"a long first content", "short"} {
		must(t, vfs.WriteFileAtomic(s.fs, name, []byte(content)))
		got, err := vfs.ReadFile(s.fs, name, 100)
		if err != nil || string(got) != content {
			t.Fatalf("%q, %v", got, err)
		}
	}
	_, err := vfs.ReadFile(s.fs, name, 4)
	wantKind(t, err, block.Corrupt)
	names, err := s.fs.List(s.dir)
	must(t, err)
	for _, n := range names {
		if vfs.IsTemp(n) {
			t.Fatalf("%s was left behind", n)
		}
	}
}

func (s suite) counters(t *testing.T) {
	before := s.fs.Counts(vfs.ClassCache)
	f, err := s.fs.Open(s.path("counted"), vfs.Create, vfs.ClassCache)
	must(t, err)
	if _, err := f.WriteAtv([][]byte{make([]byte, 100), make([]byte, 28)}, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, 72), 128); err != nil {
		t.Fatal(err)
	}
	must(t, f.Sync())
	if _, err := f.ReadAt(make([]byte, 50), 0); err != nil {
		t.Fatal(err)
	}
	must(t, f.Close())
	after := s.fs.Counts(vfs.ClassCache)
	got := vfs.Counts{Reads: after.Reads - before.Reads, ReadBytes: after.ReadBytes - before.ReadBytes, Writes: after.Writes - before.Writes,
		WrittenBytes: after.WrittenBytes - before.WrittenBytes, Syncs: after.Syncs - before.Syncs}
	if want := (vfs.Counts{Reads: 1, ReadBytes: 50, Writes: 2, WrittenBytes: 200, Syncs: 1}); got != want {
		t.Fatalf("counted %+v, want %+v", got, want)
	}
}

func (s suite) space(t *testing.T) {
	sp, err := s.fs.Space(s.dir)
	if err != nil || sp.TotalBytes <= 0 || sp.FreeBytes < 0 || sp.FreeBytes > sp.TotalBytes {
		t.Fatalf("%+v, %v", sp, err)
	}
}
