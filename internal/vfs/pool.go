package vfs

import (
	"container/list"
	"sync"

	"firn.io/firn/internal/block"
)

// Pool is an FS of which at most so many files are open in the system at once,
// however many are open to its users: those that were not used for longest are
// closed, and opened again when they are needed. A file with writes that were not
// synced stays open, so that no error of writing them back is missed.
type Pool struct {
	FS
	limit int

	mu   sync.Mutex
	open int
	idle list.List // of *pooled that are open, unused and synced; the oldest first
}

// NewPool returns fs with at most limit files open, as far as that can be: files in
// use, and those with writes that were not synced, come on top.
func NewPool(fs FS, limit int) *Pool { return &Pool{FS: fs, limit: limit} }

// OpenFiles is how many are open in the system.
func (p *Pool) OpenFiles() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.open
}

// Open implements FS.
func (p *Pool) Open(name string, f Flags, c Class) (File, error) {
	file, err := p.FS.Open(name, f, c)
	if err != nil {
		return nil, err
	}
	h := &pooled{pool: p, name: name, flags: f &^ (Create | Exclusive | Truncate), class: c, direct: file.Direct(), file: file}
	p.mu.Lock()
	p.open++
	p.rest(h)
	victims := p.surplus()
	p.mu.Unlock()
	return h, closeAll(victims)
}

// rest puts a file on the list of those that may be closed.
func (p *Pool) rest(h *pooled) {
	if h.users == 0 && h.changes == h.synced && !h.closed && h.file != nil && h.at == nil {
		h.at = p.idle.PushBack(h)
	}
}

// surplus takes the files from the list that are to be closed.
func (p *Pool) surplus() (victims []File) {
	for p.open > p.limit && p.idle.Len() > 0 {
		h := p.idle.Remove(p.idle.Front()).(*pooled)
		victims = append(victims, h.file)
		h.file, h.at = nil, nil
		p.open--
	}
	return victims
}

func closeAll(files []File) (first error) {
	for _, f := range files {
		if err := f.Close(); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// pooled is a file of a Pool.
type pooled struct {
	pool   *Pool
	name   string
	flags  Flags
	class  Class
	direct bool

	// Guarded by the pool's mu.
	file    File // nil while it is closed in the system
	users   int
	changes uint64        // calls that changed it and have ended
	synced  uint64        // of them, those that had ended when a sync began that went well
	at      *list.Element // in idle
	closed  bool
}

// take returns the file, opened, until give.
func (h *pooled) take() (File, error) {
	p := h.pool
	p.mu.Lock()
	if h.closed {
		p.mu.Unlock()
		return nil, block.Errorf(block.Internal, "%s is used after it was closed", h.name)
	}
	if h.at != nil {
		p.idle.Remove(h.at)
		h.at = nil
	}
	h.users++
	f := h.file
	p.mu.Unlock()
	if f != nil {
		return f, nil
	}
	f, err := p.FS.Open(h.name, h.flags, h.class)
	p.mu.Lock()
	var spare File
	switch {
	case err != nil:
		h.users--
		p.rest(h)
	case h.closed:
		h.users--
		spare, f = f, nil
		err = block.Errorf(block.Internal, "%s is used after it was closed", h.name)
	case h.file != nil: // another user was faster
		spare, f = f, h.file
	default:
		h.file = f
		p.open++
	}
	victims := p.surplus()
	p.mu.Unlock()
	if spare != nil {
		victims = append(victims, spare)
	}
	if cerr := closeAll(victims); err == nil && cerr != nil {
		h.give()
		err = cerr
	}
	return f, err
}

func (h *pooled) give() {
	p := h.pool
	p.mu.Lock()
	h.users--
	p.rest(h)
	victims := p.surplus()
	p.mu.Unlock()
	_ = closeAll(victims) // they were synced: nothing is lost
}

// use calls do with the file.
func (h *pooled) use(do func(f File) error) error {
	f, err := h.take()
	if err != nil {
		return err
	}
	defer h.give()
	return do(f)
}

// change is use for what a Sync must follow.
func (h *pooled) change(do func(f File) error) error {
	return h.use(func(f File) error {
		err := do(f)
		h.pool.mu.Lock() // after it: a sync that begins before knows nothing of it
		h.changes++
		h.pool.mu.Unlock()
		return err
	})
}

func (h *pooled) ReadAt(b []byte, off int64) (n int, err error) {
	err = h.use(func(f File) error { n, err = f.ReadAt(b, off); return err })
	return n, err
}

func (h *pooled) WriteAt(b []byte, off int64) (n int, err error) {
	err = h.change(func(f File) error { n, err = f.WriteAt(b, off); return err })
	return n, err
}

func (h *pooled) WriteAtv(bufs [][]byte, off int64) (n int, err error) {
	err = h.change(func(f File) error { n, err = f.WriteAtv(bufs, off); return err })
	return n, err
}

func (h *pooled) Allocate(off, n int64) error {
	return h.change(func(f File) error { return f.Allocate(off, n) })
}

func (h *pooled) Truncate(size int64) error {
	return h.change(func(f File) error { return f.Truncate(size) })
}

func (h *pooled) Sync() error {
	return h.use(func(f File) error {
		h.pool.mu.Lock()
		before := h.changes
		h.pool.mu.Unlock()
		err := f.Sync()
		if err == nil {
			h.pool.mu.Lock()
			h.synced = max(h.synced, before)
			h.pool.mu.Unlock()
		}
		return err
	})
}

func (h *pooled) Size() (n int64, err error) {
	err = h.use(func(f File) error { n, err = f.Size(); return err })
	return n, err
}

func (h *pooled) Direct() bool { return h.direct }

func (h *pooled) DropCache() error { return h.use(File.DropCache) }

func (h *pooled) Close() error {
	p := h.pool
	p.mu.Lock()
	if h.closed {
		p.mu.Unlock()
		return block.Errorf(block.Internal, "%s is closed twice", h.name)
	}
	h.closed = true
	if h.at != nil {
		p.idle.Remove(h.at)
		h.at = nil
	}
	f := h.file
	h.file = nil
	if f != nil {
		p.open--
	}
	p.mu.Unlock()
	if f == nil {
		return nil
	}
	return f.Close()
}
