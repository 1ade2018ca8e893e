package guest

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
)

// archive collects the files of an initial RAM file system and writes them as
// cpio in the "newc" format (kernel, Documentation/driver-api/early-userspace).
type archive struct {
	entries map[string]entry
}

type entry struct {
	mode uint32
	data []byte
	// from is the file that holds the data instead.
	from string
}

const (
	modeDir  = 0o040755
	modeFile = 0o100755
	modeLink = 0o120777
)

func newArchive() *archive { return &archive{entries: map[string]entry{}} }

func (a *archive) put(name string, e entry) {
	name = strings.TrimPrefix(path.Clean(name), "/")
	for dir := path.Dir(name); dir != "." && dir != "/"; dir = path.Dir(dir) {
		if _, ok := a.entries[dir]; !ok {
			a.entries[dir] = entry{mode: modeDir}
		}
	}
	a.entries[name] = e
}

func (a *archive) dir(name string)          { a.put(name, entry{mode: modeDir}) }
func (a *archive) text(name, text string)   { a.put(name, entry{mode: modeFile, data: []byte(text)}) }
func (a *archive) link(name, target string) { a.put(name, entry{mode: modeLink, data: []byte(target)}) }
func (a *archive) has(name string) bool     { _, ok := a.entries[strings.TrimPrefix(name, "/")]; return ok }
func (a *archive) file(name, at string) error {
	if _, err := os.Stat(at); err != nil {
		return err
	}
	a.put(name, entry{mode: modeFile, from: at})
	return nil
}

var programDirs = []string{"/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/sbin", "/usr/local/bin"}

// program adds a program of the host by name, with the libraries that it needs.
func (a *archive) program(name string) error {
	for _, dir := range programDirs {
		at := filepath.Join(dir, name)
		if info, err := os.Stat(at); err == nil && info.Mode()&0o111 != 0 {
			return a.executable("/bin/"+name, at)
		}
	}
	return fmt.Errorf("no program %s in %s", name, strings.Join(programDirs, ", "))
}

// library is a line of ldd: a library and where it is, or the loader.
var library = regexp.MustCompile(`(?m)^\s+(?:\S+ => )?(/\S+) \(0x`)

// executable adds the file at with its libraries.
func (a *archive) executable(name, at string) error {
	if err := a.file(name, at); err != nil {
		return err
	}
	f, err := elf.Open(at)
	if err != nil {
		return nil // a script
	}
	needs, err := f.ImportedLibraries()
	f.Close()
	if err != nil || len(needs) == 0 {
		return err
	}
	out, err := exec.Command("ldd", at).CombinedOutput()
	if err != nil {
		return fmt.Errorf("ldd %s: %w\n%s", at, err, out)
	}
	for _, m := range library.FindAllSubmatch(out, -1) {
		lib := string(m[1])
		if !a.has(lib) {
			if err := a.file(lib, lib); err != nil {
				return err
			}
		}
	}
	return nil
}

// write makes the archive.
func (a *archive) write(to string) error {
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	defer f.Close()
	names := make([]string, 0, len(a.entries))
	for name := range a.entries {
		names = append(names, name)
	}
	sort.Strings(names) // a folder before what is in it
	var w bytes.Buffer
	for i, name := range append(names, "TRAILER!!!") {
		e := a.entries[name]
		if e.from != "" {
			if e.data, err = os.ReadFile(e.from); err != nil {
				return err
			}
		}
		links := 1
		fmt.Fprintf(&w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
			i+1, e.mode, 0, 0, links, 0, len(e.data), 0, 0, 0, 0, len(name)+1, 0)
		w.WriteString(name)
		w.WriteByte(0)
		pad(&w)
		w.Write(e.data)
		pad(&w)
		// What is written is whole words, so that pad goes on from zero.
		if _, err := w.WriteTo(f); err != nil {
			return err
		}
	}
	return f.Close()
}

func pad(w *bytes.Buffer) {
	for w.Len()%4 != 0 {
		w.WriteByte(0)
	}
}
