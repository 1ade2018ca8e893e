package e2e

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/wire"
)

const (
	// silence is how long a roaming device waits for an answer before it tries
	// another gateway.
	silence = 8 * time.Second
	// standstill without any success ends a test.
	standstill = 60 * time.Second
	// dialTime bounds one attempt to enter a volume.
	dialTime = 5 * time.Second
)

// roamingDevice is a volume seen through a few NBD connections to one of several
// gateways. It does what `firn attach` does: when a connection breaks, or nothing
// is answered for long, it dials the next gateway that lets it in, as a newer
// incarnation of its session, and sends what was not answered again. An operation
// fails only by an error that a server answered, or at a standstill.
type roamingDevice struct {
	t       testing.TB
	volume  string
	session [16]byte

	mu       sync.Mutex
	gateways []string
	current  *incarnation
	moves    int
}

// incarnation are the connections of one time of dialing.
type incarnation struct {
	number  uint64
	gateway int
	conns   []*client.Conn
	next    int
	once    sync.Once
	silent  atomic.Bool
}

func (i *incarnation) abandon() {
	i.once.Do(func() {
		for _, c := range i.conns {
			c.Abort()
		}
	})
}

// hush gives it up because nothing was answered: the next is dialed elsewhere.
func (i *incarnation) hush() {
	i.silent.Store(true)
	i.abandon()
}

func roam(t testing.TB, volume string, gateways ...string) *roamingDevice {
	t.Helper()
	d := &roamingDevice{t: t, volume: volume, session: [16]byte{byte(len(gateways)), 0xf1}, gateways: gateways}
	copy(d.session[2:], volume)
	if _, err := d.connected(context.Background(), nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.current != nil {
			d.current.abandon()
		}
	})
	return d
}

// Gateway is the number of the gateway that is used now.
func (d *roamingDevice) Gateway() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.current.gateway
}

// connected returns an incarnation that is newer than old, or dials one.
func (d *roamingDevice) connected(ctx context.Context, old *incarnation) (*incarnation, error) {
	if old != nil {
		old.abandon()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.current != old {
		return d.current, nil
	}
	in := &incarnation{number: 1}
	if old != nil {
		in.number, in.gateway = old.number, old.gateway
		if old.silent.Load() {
			in.gateway = (in.gateway + 1) % len(d.gateways)
		}
	}
	deadline := time.Now().Add(standstill)
	pause := time.NewTicker(50 * time.Millisecond)
	defer pause.Stop()
	for {
		in.number++
		err := d.dial(ctx, in)
		if err == nil {
			d.current = in
			d.moves++
			return in, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("no gateway lets the volume in for %v: %w", standstill, err)
		}
		in.gateway = (in.gateway + 1) % len(d.gateways)
		select {
		case <-pause.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

const roamingConnections = 2

func (d *roamingDevice) dial(ctx context.Context, in *incarnation) error {
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	for i := range roamingConnections {
		c, err := client.Dial(ctx, d.gateways[in.gateway], client.Options{
			Export: d.volume, Session: wire.Session{ID: d.session, Connection: uint32(i), Incarnation: in.number},
		})
		if err != nil {
			for _, c := range in.conns {
				c.Abort()
			}
			in.conns = nil
			return err
		}
		in.conns = append(in.conns, c)
	}
	return nil
}

// do repeats a call until it is answered.
func (d *roamingDevice) do(ctx context.Context, command wire.Command, data []byte, off, n int64) error {
	var old *incarnation
	began := time.Now()
	for {
		in, err := d.connected(ctx, old)
		if err != nil {
			return err
		}
		d.mu.Lock()
		c := in.conns[in.next%len(in.conns)]
		in.next++
		d.mu.Unlock()
		watch := time.AfterFunc(silence, in.hush)
		err = c.Do(context.WithoutCancel(ctx), &client.Call{Command: command, Data: data, Off: uint64(off), Bytes: uint64(n)})
		watch.Stop()
		var refused wire.Errno
		switch {
		case err == nil:
			return nil
		case errors.As(err, &refused): // ESHUTDOWN as well: the kernel makes EIO of it
			return err
		case ctx.Err() != nil:
			return ctx.Err()
		case time.Since(began) > standstill:
			return fmt.Errorf("not answered for %v: %w", standstill, err)
		}
		old = in
	}
}

func (d *roamingDevice) ReadAt(ctx context.Context, p []byte, off int64) error {
	return d.do(ctx, wire.CmdRead, p, off, 0)
}

func (d *roamingDevice) WriteAt(ctx context.Context, p []byte, off int64) error {
	return d.do(ctx, wire.CmdWrite, p, off, 0)
}

func (d *roamingDevice) Trim(ctx context.Context, off, n int64) error {
	return d.do(ctx, wire.CmdTrim, nil, off, n)
}

func (d *roamingDevice) Flush(ctx context.Context) error {
	return d.do(ctx, wire.CmdFlush, nil, 0, 0)
}
