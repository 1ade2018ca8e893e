// Package attach makes an NBD export a block device of the Linux kernel, and
// keeps it one: it connects sockets that package client has negotiated to
// /dev/nbdN through generic netlink, and when connections break it dials the
// same or another server and hands over new ones, while the kernel holds back
// and repeats what was not answered. By default the kernel waits for ever, so
// that a server's absence is a stall and never an I/O error.
//
// The sources of what the kernel does are linux/drivers/block/nbd.c and
// include/uapi/linux/nbd-netlink.h; of the protocol, doc/proto.md of
// github.com/NetworkBlockDevice/nbd. A connection tells Firn's servers which
// device it belongs to (rule F7), so that no write of a lost connection lands
// after those of its successor.
//
// A device that is given several connections has one limit that one connection
// has not: when one of them breaks, the kernel repeats its requests on the
// others at once, and no server can know that those repeat what may still sit
// unread in the broken one. On one host and one network that is the time in
// which a server learns of a broken connection.
package attach

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/wire"
)

// MaxConnections bounds Config.Connections.
const MaxConnections = 16

const (
	// requestTimeSeveral is Config.RequestTime of several connections: what the
	// kernel repeats on another one is fenced by nothing, so it must be above what
	// any server takes.
	requestTimeSeveral = 30 * time.Second
	// infoTime bounds the question whether a server is there and has the export.
	infoTime = 2 * time.Second
	// enterTime bounds entering an export: a gateway that takes a volume over
	// waits until the lease of the old one is surely over.
	enterTime = 15 * time.Second
	// takeTime bounds how long the kernel may take to see that a connection is
	// dead that was shut down here.
	takeTime = 5 * time.Second
	// probeEvery is how often the server is asked for the size, and whether it is
	// still there.
	probeEvery = 2 * time.Second
	// stuckTime is how long a server may answer nobody before its connections are
	// given up, if another server answers.
	stuckTime = 5 * time.Second
	// partialTime is how long a device may lack some of its connections before
	// the others are given up too.
	partialTime = 10 * time.Second
	// minPause and maxPause bound the wait between rounds of attempts.
	minPause = 50 * time.Millisecond
	maxPause = time.Second
)

// Config says what to attach.
type Config struct {
	// Export is the name of the export, the volume's.
	Export string
	// Gateways are servers that have it, HOST:PORT or unix:PATH, in order of
	// preference.
	Gateways []string
	// Connections is how many the device uses side by side; 0 is one.
	Connections int
	// Index asks for /dev/nbd<Index>; negative: any that is free.
	Index int
	// BlockBytes is the logical block, 512 or 4096.
	BlockBytes int
	// RequestTime is after what time without an answer the kernel gives up the
	// connection of a request and sends the request again. It ends no request.
	// 0 is 30 s for several connections, and for one: never. Then a request waits
	// as long as its connection lives, and what was in flight when that broke is
	// sent again on the next one, at most 3 s after the break or at once after
	// that. Otherwise a failover takes at least this long, counted from the oldest
	// request, for the driver has no other way to repeat it.
	RequestTime time.Duration
	// TLS, if set, is required of the servers; a ServerName that is empty is the
	// host of the address. The kernel has no TLS: this process then carries all
	// data between it and the servers, so that the device stands still while
	// nobody runs it.
	TLS *tls.Config
	// DeadTime is how long the kernel waits for new connections before requests
	// fail; 0 is for ever.
	DeadTime time.Duration
	// Kernel is the driver; nil is this machine's.
	Kernel Kernel
	Log    *slog.Logger
	Clock  clock.Clock
	// Changed is called, by one goroutine at a time, when the Status has changed,
	// and before connections of a new incarnation are made. It must not wait.
	Changed func(Status)
}

// Status is what is known of an attached device.
type Status struct {
	Export string `json:"volume"`
	// Backend identifies the volume to the kernel: its UUID.
	Backend string `json:"backend"`
	Index   int    `json:"index"`
	Bytes   int64  `json:"size_bytes"`
	// Gateway is the server in use, or the last that was.
	Gateway     string   `json:"gateway"`
	Gateways    []string `json:"gateways"`
	Connections int      `json:"connections"`
	// TLS says that the gateways are spoken to by TLS.
	TLS bool `json:"tls"`
	// Live is how many of them there are now.
	Live int `json:"live"`
	// Reconnects counts connections that took the place of lost ones, Moves those
	// times when that was at another server.
	Reconnects uint64 `json:"reconnects"`
	Moves      uint64 `json:"moves"`
	// DownMillis is how long the device was without any connection so far, in
	// all, and LongestMillis the longest of those times.
	DownMillis    int64 `json:"down_ms"`
	LongestMillis int64 `json:"longest_down_ms"`
	// Problem is why connections are missing, empty if none are.
	Problem string `json:"problem,omitempty"`
	// Session and Incarnation are for whoever adopts the device later.
	Session     string `json:"session"`
	Incarnation uint64 `json:"incarnation"`
}

// Device is an attached device.
type Device struct {
	cfg     Config
	kernel  Kernel
	session [16]byte

	mu     sync.Mutex
	status Status
	slots  []slot
	// byID: the volume is asked for by its UUID, for its name is not Config.Export
	// any more.
	byID bool
	// downSince is when the last connection was lost, 0 if there is one.
	downSince clock.Instant

	// next is the gateway to begin with when connections are made anew; empty: the
	// one in use.
	next string

	// adopted: the kernel may have connections that this process has not made.
	adopted bool
	// lost: the kernel knows that it has to take back what is in flight. Run's.
	lost    bool
	growing bool
	// hurt is sent to when a connection may be dead.
	hurt chan struct{}
	// calls are the goroutines of the device.
	calls   sync.WaitGroup
	tunnels tunnels
}

// slot is one of the kernel's connections.
type slot struct {
	// fd is -1 if this process has no hold on it.
	fd   int
	dead bool
}

func (c *Config) check() error {
	if c.Export == "" || len(c.Gateways) == 0 {
		return block.Errorf(block.Invalid, "an export and a gateway must be named")
	}
	if c.Connections == 0 {
		c.Connections = 1
	}
	if c.Connections < 1 || c.Connections > MaxConnections {
		return block.Errorf(block.Invalid, "%d connections; between 1 and %d are possible", c.Connections, MaxConnections)
	}
	if c.BlockBytes == 0 {
		c.BlockBytes = 512
	}
	if c.BlockBytes != 512 && c.BlockBytes != 4096 {
		return block.Errorf(block.Invalid, "a block of %d bytes; it may be 512 or 4096", c.BlockBytes)
	}
	if c.RequestTime == 0 && c.Connections > 1 {
		c.RequestTime = requestTimeSeveral
	}
	if c.RequestTime != 0 && c.RequestTime < time.Second {
		return block.Errorf(block.Invalid, "a request time of %v; it must be at least a second", c.RequestTime)
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Clock == nil {
		c.Clock = clock.System{}
	}
	if c.Changed == nil {
		c.Changed = func(Status) {}
	}
	return nil
}

func newDevice(cfg Config) (*Device, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	d := &Device{cfg: cfg, kernel: cfg.Kernel, hurt: make(chan struct{}, 1)}
	if d.kernel == nil {
		k, err := openKernel()
		if err != nil {
			return nil, err
		}
		d.kernel = k
	}
	d.status = Status{Export: cfg.Export, Gateways: cfg.Gateways, Connections: cfg.Connections, TLS: cfg.TLS != nil, Index: -1}
	d.slots = make([]slot, cfg.Connections)
	for i := range d.slots {
		d.slots[i] = slot{fd: -1, dead: true}
	}
	return d, nil
}

// Attach connects a device that is not connected yet. It tries each gateway
// once. Busy: another device has this volume.
func Attach(ctx context.Context, cfg Config) (*Device, error) {
	d, err := newDevice(cfg)
	if err != nil {
		return nil, err
	}
	if err := d.attach(ctx); err != nil {
		d.tunnels.close()
		d.closeSockets()
		return nil, errors.Join(err, d.kernel.Close())
	}
	return d, nil
}

func (d *Device) attach(ctx context.Context) error {
	if _, err := rand.Read(d.session[:]); err != nil {
		return err
	}
	fds := make([]int, 0, len(d.slots))
	defer func() { d.adoptSockets(fds) }()
	fd, export, err := d.dialAny(ctx)
	if err != nil {
		return err
	}
	fds = append(fds, fd)
	if len(d.slots) > 1 && export.Flags&wire.CanMultiConn == 0 {
		return block.Errorf(block.Invalid, "the server at %s does not allow several connections to %s", d.status.Gateway, d.cfg.Export)
	}
	for len(fds) < len(d.slots) {
		fd, _, err := d.enter(ctx, d.status.Gateway, uint32(len(fds)))
		if err != nil {
			return err
		}
		fds = append(fds, fd)
	}
	backend := backendOf(export, d.cfg)
	if other, taken := d.kernel.Find(backend); taken {
		return block.Errorf(block.Busy, "%s has this volume already; `firn detach %s` ends that", devicePath(other), devicePath(other))
	}
	size := int64(export.Bytes) / int64(d.cfg.BlockBytes) * int64(d.cfg.BlockBytes)
	index, err := d.kernel.Connect(Setup{
		Index: d.cfg.Index, Bytes: size, BlockBytes: d.cfg.BlockBytes, Flags: uint64(export.Flags), FDs: fds,
		Backend: backend, RequestTime: d.cfg.RequestTime, DeadTime: d.cfg.DeadTime,
	})
	if err != nil {
		return err
	}
	d.status.Index, d.status.Backend, d.status.Bytes = index, backend, size
	return nil
}

// adoptSockets notes the sockets of the slots, in order.
func (d *Device) adoptSockets(fds []int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, fd := range fds {
		d.slots[i] = slot{fd: fd}
	}
	d.status.Live = len(fds)
}

// Adopt takes over a device that an earlier process has attached and left, and
// of which last is the last Status: its connections are made anew.
func Adopt(cfg Config, last Status) (*Device, error) {
	cfg.Connections = last.Connections
	d, err := newDevice(cfg)
	if err != nil {
		return nil, err
	}
	id, err := block.ParseUUID(last.Session)
	if err != nil {
		return nil, errors.Join(block.Wrap(block.Corrupt, err, "session of the device"), d.kernel.Close())
	}
	d.session, d.adopted = id, true
	gateways := d.status.Gateways
	d.status = last
	d.status.Gateways, d.status.Live, d.status.TLS = gateways, 0, cfg.TLS != nil
	d.downSince = d.cfg.Clock.Now()
	d.hurt <- struct{}{}
	return d, nil
}

// backendPrefix begins the description of Firn's exports; the volume's UUID
// follows.
const backendPrefix = "Firn volume "

// backendOf names the volume to the kernel: by its UUID, or for exports of other
// servers by export and server.
func backendOf(e client.Export, cfg Config) string {
	if text, ok := strings.CutPrefix(e.Description, backendPrefix); ok {
		if _, err := block.ParseUUID(text); err == nil {
			return text
		}
	}
	return fmt.Sprintf("nbd://%s/%s", cfg.Gateways[0], cfg.Export)
}

// Status returns what is known now.
func (d *Device) Status() Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.statusLocked()
}

func (d *Device) statusLocked() Status {
	s := d.status
	s.Session = block.FormatUUID(d.session)
	return s
}

// Path is the device's file.
func (d *Device) Path() string { return devicePath(d.Status().Index) }

func devicePath(index int) string { return fmt.Sprintf("/dev/nbd%d", index) }

// changed tells of the status.
func (d *Device) changed() { d.cfg.Changed(d.Status()) }

// Close lets go of the device and leaves it connected: requests go on as long as
// the connections live. It is called when Run has returned.
//
// With TLS its requests wait from then on.
func (d *Device) Close() error {
	d.calls.Wait()
	d.tunnels.close()
	d.closeSockets()
	return d.kernel.Close()
}

// closeSockets closes this process's hold on the sockets; the kernel has its own.
func (d *Device) closeSockets() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range d.slots {
		d.slots[i].release()
	}
}
