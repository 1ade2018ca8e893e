package vfs

import (
	"io"
	iofs "io/fs"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"sync"

	"firn.io/firn/internal/block"
)

// Op names a call of a file system, for Rules.
type Op uint8

const (
	// OpOpen is FS.Open.
	OpOpen Op = iota
	// OpRead is File.ReadAt.
	OpRead
	// OpWrite is File.WriteAt and File.WriteAtv.
	OpWrite
	// OpSync is File.Sync.
	OpSync
	// OpSize is File.Allocate and File.Truncate.
	OpSize
	// OpNames is Remove, RemoveAll, Rename, MkdirAll and the making of files.
	OpNames
	// OpSyncDir is FS.SyncDir.
	OpSyncDir
)

// Call is one call of a simulated file system.
type Call struct {
	Op   Op
	Name string // of the file or folder
	Off  int64  // OpRead, OpWrite
	Len  int
}

// Rule is asked before each call, in the order of the calls. An error that it
// returns is the call's own: a write that fails so may have reached the disk in
// part, a sync that fails so loses what it was to write although it stays
// readable until a crash, as on real systems. Rule must not call the file
// system but for Kill.
type Rule func(Call) error

// Partial is what a Rule returns for a write that fails after its first Bytes.
type Partial struct {
	Bytes int
	Err   error
}

func (p *Partial) Error() string { return p.Err.Error() }

// Unwrap returns the cause.
func (p *Partial) Unwrap() error { return p.Err }

// ReadFault is how a read that succeeds, or does not, brings something else than
// what is there. The zero value is none.
type ReadFault struct {
	Err error
	// Shift makes the disk read so many bytes further on: a misdirected read.
	Shift int64
	// Stale gives sectors as they were before the last sync that changed them.
	Stale bool
}

// ReadRule is asked before each read that a Rule let pass. It must not call the
// file system.
type ReadRule func(Call) ReadFault

// Sim is a simulated disk with its file system. What was written is readable
// at once and durable only after Sync (contents and length) or SyncDir (names).
// Crash gives the disk as it is found after the power came back: of what was
// not synced any subset is there, by sectors of 512 bytes, by lengths and by
// names; an overwritten sector may hold any of the versions since its last sync.
//
// It starts no goroutine, draws chance only from what Crash is given, and so is
// replayed exactly.
type Sim struct {
	mu       sync.Mutex
	root     *node
	capacity int64
	used     int64
	rule     Rule
	readRule ReadRule
	held     *sync.Cond // not nil while calls of files wait
	dead     error
	inodes   uint64
	counters [NumClasses]counters
}

// node is a file or a folder.
type node struct {
	id   uint64
	dir  bool
	file simData

	// A folder: names now, names on the disk, and the changes between them.
	names   map[string]*node
	durable map[string]*node
	changes []change
	locked  bool
}

// change is one change of names. A rename within a folder has two names; one
// across folders is a change of each.
type change struct {
	names []string
	nodes []*node // after the change; nil for a name that is gone
}

// NewSim returns an empty disk. capacity bounds the bytes of all files
// together; 0 is no bound.
func NewSim(capacity int64) *Sim {
	s := &Sim{capacity: capacity}
	s.root = s.newNode(true)
	return s
}

func (s *Sim) newNode(dir bool) *node {
	s.inodes++
	n := &node{id: s.inodes, dir: dir}
	if dir {
		n.names, n.durable = map[string]*node{}, map[string]*node{}
	}
	return n
}

// SetRule replaces the rule; nil is none.
func (s *Sim) SetRule(r Rule) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rule = r
}

// SetReadRule replaces the rule of reads; nil is none. Old content is kept for
// stale reads while there is one.
func (s *Sim) SetReadRule(r ReadRule) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.readRule = r
}

// Stall makes every read, write and sync wait until release is called. Where
// time is virtual, a disk stalls by the latency of its Loop instead.
func (s *Sim) Stall() (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held == nil {
		s.held = sync.NewCond(&s.mu)
	}
	c := s.held
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.held == c {
			s.held = nil
			c.Broadcast()
		}
	}
}

// SetCapacity changes the bound on the bytes of all files.
func (s *Sim) SetCapacity(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.capacity = n
}

// Kill makes every call from now on fail with err, the calls that a rule is
// asked about included: the power is off. Crash then shows what is left. A rule
// may call it, others too.
func (s *Sim) Kill(err error) { s.dead = err }

// ask is called at the beginning of every call with mu held.
func (s *Sim) ask(c Call) error {
	if s.dead == nil && s.rule != nil {
		if err := s.rule(c); err != nil {
			return err
		}
	}
	return s.dead
}

// Crash returns the disk after a loss of power. What survives of what was not
// synced is drawn from r; nil keeps nothing of it. Files open on s stay with s.
func (s *Sim) Crash(r *rand.Rand) *Sim {
	s.mu.Lock()
	defer s.mu.Unlock()
	after := &Sim{capacity: s.capacity}
	seen := map[*node]*node{}
	after.root = after.survive(s.root, r, seen)
	for c := range s.counters {
		from := s.counters[c].counts()
		to := &after.counters[c]
		to.reads.Store(from.Reads)
		to.readBytes.Store(from.ReadBytes)
		to.writes.Store(from.Writes)
		to.writtenBytes.Store(from.WrittenBytes)
		to.syncs.Store(from.Syncs)
	}
	return after
}

// survive copies what is left of n. Names are walked in their order, so that
// the draws are the same in each run.
func (s *Sim) survive(n *node, r *rand.Rand, seen map[*node]*node) *node {
	if m := seen[n]; m != nil {
		return m
	}
	m := s.newNode(n.dir)
	seen[n] = m
	if !n.dir {
		m.file = n.file.survive(r)
		s.used += m.file.size
		return m
	}
	names := make(map[string]*node, len(n.durable))
	for name, child := range n.durable {
		names[name] = child
	}
	// A change survives only if all earlier ones of its names did.
	lost := map[string]bool{}
	for _, c := range n.changes {
		keep := r != nil && r.IntN(2) == 0
		for _, name := range c.names {
			keep = keep && !lost[name]
		}
		for i, name := range c.names {
			switch {
			case !keep:
				lost[name] = true
			case c.nodes[i] == nil:
				delete(names, name)
			default:
				names[name] = c.nodes[i]
			}
		}
	}
	for _, name := range sortedNames(names) {
		child := s.survive(names[name], r, seen)
		m.names[name], m.durable[name] = child, child
	}
	return m
}

func sortedNames(m map[string]*node) []string {
	names := make([]string, 0, len(m))
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Rot inverts the bits of [off, off+n) of a file, on the disk and as it is read.
func (s *Sim) Rot(name string, off, n int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, err := s.find(name)
	if err != nil {
		return err
	}
	f.file.rot(off, n)
	return nil
}

func simError(k block.Kind, cause error, doing, name string) error {
	return block.Wrap(k, cause, "%s %s", doing, name)
}

func split(name string) []string {
	name = strings.Trim(path.Clean("/"+name), "/")
	if name == "" {
		return nil
	}
	return strings.Split(name, "/")
}

// find returns what has a name.
func (s *Sim) find(name string) (*node, error) {
	n := s.root
	for _, part := range split(name) {
		child := n.names[part]
		if child == nil {
			return nil, simError(block.NotFound, iofs.ErrNotExist, "find", name)
		}
		n = child
	}
	return n, nil
}

// parent returns the folder of a name and the name in it.
func (s *Sim) parent(name string) (*node, string, error) {
	parts := split(name)
	if len(parts) == 0 {
		return nil, "", block.Errorf(block.Invalid, "%q names no file", name)
	}
	dir, err := s.find(path.Join(parts[:len(parts)-1]...))
	if err == nil && !dir.dir {
		err = simError(block.NotFound, iofs.ErrNotExist, "find", name)
	}
	return dir, parts[len(parts)-1], err
}

func (n *node) set(names []string, nodes []*node) {
	for i, name := range names {
		if nodes[i] == nil {
			delete(n.names, name)
		} else {
			n.names[name] = nodes[i]
		}
	}
	n.changes = append(n.changes, change{names, nodes})
}

// Open implements FS.
func (s *Sim) Open(name string, f Flags, c Class) (File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.ask(Call{Op: OpOpen, Name: name}); err != nil {
		return nil, err
	}
	dir, base, err := s.parent(name)
	if err != nil {
		return nil, err
	}
	n := dir.names[base]
	switch {
	case n == nil && f&Create == 0:
		return nil, simError(block.NotFound, iofs.ErrNotExist, "open", name)
	case n != nil && f&Create != 0 && f&Exclusive != 0:
		return nil, simError(block.Exists, iofs.ErrExist, "open", name)
	case n != nil && n.dir:
		return nil, block.Errorf(block.Invalid, "open %s: it is a folder", name)
	case n == nil:
		if err := s.ask(Call{Op: OpNames, Name: name}); err != nil {
			return nil, err
		}
		n = s.newNode(false)
		dir.set([]string{base}, []*node{n})
	}
	if f&Truncate != 0 {
		s.used -= n.file.size
		n.file.resize(0)
	}
	return &simFile{s: s, n: n, name: name, readOnly: f&ReadOnly != 0, c: &s.counters[c]}, nil
}

// Remove implements FS.
func (s *Sim) Remove(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.ask(Call{Op: OpNames, Name: name}); err != nil {
		return err
	}
	dir, base, err := s.parent(name)
	if err != nil {
		return err
	}
	n := dir.names[base]
	switch {
	case n == nil:
		return simError(block.NotFound, iofs.ErrNotExist, "remove", name)
	case n.dir && len(n.names) > 0:
		return block.Errorf(block.Invalid, "remove %s: the folder is not empty", name)
	}
	s.used -= n.bytes()
	dir.set([]string{base}, []*node{nil})
	return nil
}

func (n *node) bytes() int64 {
	total := n.file.size
	for _, child := range n.names {
		total += child.bytes()
	}
	return total
}

// RemoveAll implements FS.
func (s *Sim) RemoveAll(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.ask(Call{Op: OpNames, Name: name}); err != nil {
		return err
	}
	dir, base, err := s.parent(name)
	if err != nil || dir.names[base] == nil {
		if err != nil && block.KindOf(err) != block.NotFound {
			return err
		}
		return nil
	}
	n := dir.names[base]
	s.used -= n.bytes()
	n.clear()
	dir.set([]string{base}, []*node{nil})
	return nil
}

// clear removes all below a folder, each name as a change of its own.
func (n *node) clear() {
	for _, name := range sortedNames(n.names) {
		n.names[name].clear()
		n.set([]string{name}, []*node{nil})
	}
}

// Rename implements FS.
func (s *Sim) Rename(from, to string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.ask(Call{Op: OpNames, Name: from}); err != nil {
		return err
	}
	fd, fb, err := s.parent(from)
	if err != nil {
		return err
	}
	td, tb, err := s.parent(to)
	if err != nil {
		return err
	}
	n := fd.names[fb]
	if n == nil {
		return simError(block.NotFound, iofs.ErrNotExist, "rename", from)
	}
	if old := td.names[tb]; old != nil && old != n {
		s.used -= old.bytes()
	}
	if fd == td {
		fd.set([]string{tb, fb}, []*node{n, nil})
		return nil
	}
	td.set([]string{tb}, []*node{n})
	fd.set([]string{fb}, []*node{nil})
	return nil
}

// List implements FS.
func (s *Sim) List(dir string) ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead != nil {
		return nil, s.dead
	}
	n, err := s.find(dir)
	if err != nil {
		return nil, err
	}
	if !n.dir {
		return nil, block.Errorf(block.Invalid, "list %s: it is no folder", dir)
	}
	return sortedNames(n.names), nil
}

// MkdirAll implements FS.
func (s *Sim) MkdirAll(dir string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.ask(Call{Op: OpNames, Name: dir}); err != nil {
		return err
	}
	n := s.root
	for _, part := range split(dir) {
		child := n.names[part]
		if child == nil {
			child = s.newNode(true)
			n.names[part], n.durable[part] = child, child
		}
		if !child.dir {
			return simError(block.Exists, iofs.ErrExist, "make folder", dir)
		}
		n = child
	}
	return nil
}

// SyncDir implements FS.
func (s *Sim) SyncDir(dir string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counters[ClassOther].syncs.Add(1)
	if err := s.ask(Call{Op: OpSyncDir, Name: dir}); err != nil {
		return syncError(err, dir)
	}
	n, err := s.find(dir)
	if err != nil {
		return err
	}
	n.durable = make(map[string]*node, len(n.names))
	for name, child := range n.names {
		n.durable[name] = child
	}
	n.changes = nil
	return nil
}

// Stat implements FS.
func (s *Sim) Stat(name string) (Info, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead != nil {
		return Info{}, s.dead
	}
	n, err := s.find(name)
	if err != nil {
		return Info{}, err
	}
	return Info{Name: path.Base(name), Size: n.file.size, IsDir: n.dir}, nil
}

type simLock struct {
	s *Sim
	n *node
}

func (l simLock) Close() error {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	l.n.locked = false
	return nil
}

// Lock implements FS. The lock ends with the Sim: a crash frees it.
func (s *Sim) Lock(name string) (io.Closer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead != nil {
		return nil, s.dead
	}
	dir, base, err := s.parent(name)
	if err != nil {
		return nil, err
	}
	n := dir.names[base]
	if n == nil {
		n = s.newNode(false)
		dir.set([]string{base}, []*node{n})
	}
	if n.locked {
		return nil, block.Errorf(block.Busy, "lock %s: it is held", name)
	}
	n.locked = true
	return simLock{s, n}, nil
}

// Space implements FS.
func (s *Sim) Space(dir string) (Space, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead != nil {
		return Space{}, s.dead
	}
	if s.capacity == 0 {
		return Space{TotalBytes: 1 << 50, FreeBytes: 1<<50 - s.used}, nil
	}
	return Space{TotalBytes: s.capacity, FreeBytes: max(0, s.capacity-s.used)}, nil
}

// Counts implements FS.
func (s *Sim) Counts(c Class) Counts { return s.counters[c].counts() }
