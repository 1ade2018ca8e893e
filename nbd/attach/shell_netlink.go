package attach

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"firn.io/firn/internal/block"
)

var errBusy error = unix.EBUSY

// The commands and attributes of include/uapi/linux/nbd-netlink.h.
const (
	familyName = "nbd"
	groupName  = "nbd_mc_group"

	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3
	cmdLinkDead    = 4

	attrIndex       = 1
	attrSize        = 2
	attrBlockSize   = 3
	attrTimeout     = 4
	attrServerFlags = 5
	attrSockets     = 7
	attrDeadTimeout = 8
	attrBackend     = 10
	attrSockItem    = 1
	attrSockFD      = 1
)

const (
	// deadForEver stands for no limit, which the kernel has not.
	deadForEver = 100 * 365 * 24 * time.Hour
	// lookEvery is how often the kernel looks after a request in flight of a device
	// without a RequestTime: whether its connection has been replaced, or is lost.
	// It notes each look in its log, so this is not smaller.
	lookEvery = 2 * time.Second
	// requestTimeOld stands for no RequestTime where the driver does not look
	// after replaced connections (before Linux 5.8).
	requestTimeOld = 5 * time.Second
	// maxSectors is the size of the largest request in KiB that the device is
	// set to; the driver's default is 128.
	maxSectors = 1024
	// deadQueue bounds LINK_DEAD messages that wait.
	deadQueue = 64
)

// netlinkKernel speaks to the driver by generic netlink. Each call has a socket
// of its own: a call that the kernel holds up holds up no other.
type netlinkKernel struct {
	family genetlink.Family
	group  *genetlink.Conn
	dead   chan int
	over   sync.WaitGroup
}

// openKernel returns this machine's driver.
func openKernel() (Kernel, error) {
	if err := loadModule(); err != nil {
		return nil, err
	}
	return openFamily(familyName)
}

// openFamily finds the driver by the name of its netlink interface.
func openFamily(name string) (Kernel, error) {
	c, err := genetlink.Dial(nil)
	if err != nil {
		return nil, err
	}
	k := &netlinkKernel{group: c, dead: make(chan int, deadQueue)}
	k.family, err = c.GetFamily(name)
	if err == nil {
		err = k.join()
	} else if errors.Is(err, fs.ErrNotExist) {
		err = errNoNetlink
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	k.over.Add(1)
	go k.receive()
	return k, nil
}

// errNoNetlink: the driver is older than its netlink interface. There is no
// fallback to its ioctls: docs/decisions/0009-no-ioctl.md.
var errNoNetlink = block.Errorf(block.Unsupported, "this kernel's NBD driver has no netlink interface, by which lost connections are replaced; Linux has it since 4.12: use a newer kernel, or `nbd-client` for a device that fails when its connection breaks")

func (k *netlinkKernel) join() error {
	for _, g := range k.family.Groups {
		if g.Name == groupName {
			return k.group.JoinGroup(g.ID)
		}
	}
	return block.Errorf(block.Unsupported, "the NBD driver has no multicast group %s", groupName)
}

// receive passes LINK_DEAD messages on until Close.
func (k *netlinkKernel) receive() {
	defer k.over.Done()
	for {
		messages, _, err := k.group.Receive()
		if errors.Is(err, unix.ENOBUFS) {
			continue // some were lost; the sockets tell as well
		}
		if err != nil {
			return
		}
		for _, m := range messages {
			if m.Header.Command != cmdLinkDead {
				continue
			}
			if index, err := indexOf(m.Data); err == nil {
				select {
				case k.dead <- index:
				default:
				}
			}
		}
	}
}

// Dead implements Kernel.
func (k *netlinkKernel) Dead() <-chan int { return k.dead }

// Close implements Kernel.
func (k *netlinkKernel) Close() error {
	err := k.group.Close()
	k.over.Wait()
	return err
}

func indexOf(data []byte) (int, error) {
	ad, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return 0, err
	}
	index := -1
	for ad.Next() {
		if ad.Type() == attrIndex {
			index = int(ad.Uint32())
		}
	}
	if index < 0 {
		return 0, errors.Join(errors.New("no device index"), ad.Err())
	}
	return index, ad.Err()
}

// call sends one command. Commands without an answer of their own are
// acknowledged.
func (k *netlinkKernel) call(command uint8, answered bool, fill func(*netlink.AttributeEncoder)) ([]byte, error) {
	ae := netlink.NewAttributeEncoder()
	fill(ae)
	data, err := ae.Encode()
	if err != nil {
		return nil, err
	}
	c, err := genetlink.Dial(nil)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.SetOption(netlink.ExtendedAcknowledge, true); err != nil && !errors.Is(err, unix.ENOPROTOOPT) {
		return nil, err
	}
	flags := netlink.Request
	if !answered {
		flags |= netlink.Acknowledge
	}
	m := genetlink.Message{Header: genetlink.Header{Command: command, Version: k.family.Version}, Data: data}
	out, err := c.Execute(m, k.family.ID, flags)
	switch {
	case errors.Is(err, unix.EPERM):
		return nil, block.Wrap(block.Denied, err, "the NBD driver wants CAP_SYS_ADMIN; run this as root")
	case errors.Is(err, unix.EBUSY):
		return nil, block.Wrap(block.Busy, err, "NBD driver")
	case err != nil || len(out) == 0:
		return nil, err
	}
	return out[0].Data, nil
}

func sockets(ae *netlink.AttributeEncoder, fds ...int) {
	ae.Nested(attrSockets, func(list *netlink.AttributeEncoder) error {
		for _, fd := range fds {
			list.Nested(attrSockItem, func(item *netlink.AttributeEncoder) error {
				item.Uint32(attrSockFD, uint32(fd))
				return nil
			})
		}
		return nil
	})
}

func seconds(d time.Duration) uint64 { return uint64((d + time.Second - 1) / time.Second) }

// Connect implements Kernel.
func (k *netlinkKernel) Connect(s Setup) (int, error) {
	dead := s.DeadTime
	if dead == 0 {
		dead = deadForEver
	}
	answer, err := k.call(cmdConnect, true, func(ae *netlink.AttributeEncoder) {
		if s.Index >= 0 {
			ae.Uint32(attrIndex, uint32(s.Index))
		}
		ae.Uint64(attrSize, uint64(s.Bytes))
		ae.Uint64(attrBlockSize, uint64(s.BlockBytes))
		ae.Uint64(attrTimeout, seconds(s.RequestTime))
		ae.Uint64(attrDeadTimeout, seconds(dead))
		ae.Uint64(attrServerFlags, s.Flags)
		ae.String(attrBackend, s.Backend)
		sockets(ae, s.FDs...)
	})
	if err != nil {
		return -1, fmt.Errorf("connect an NBD device: %w", err)
	}
	index, err := indexOf(answer)
	if err != nil {
		return -1, fmt.Errorf("answer of the NBD driver: %w", err)
	}
	// Requests may be larger than the driver's default.
	err = setQueue(index, "max_sectors_kb", maxSectors)
	if err == nil && s.RequestTime == 0 {
		if repeats(index) {
			err = k.Watch(index)
		} else {
			err = k.requestTime(index, s.Backend, requestTimeOld)
		}
	}
	if err != nil {
		return -1, errors.Join(err, k.Disconnect(index))
	}
	return index, nil
}

// setQueue sets an attribute of the device's queue.
func setQueue(index int, attribute string, value int64) error {
	path := filepath.Join(sysBlock, deviceName(index), "queue", attribute)
	return os.WriteFile(path, strconv.AppendInt(nil, value, 10), 0)
}

// repeats tells whether the driver, while a device has no request time, sends a
// request again whose connection has been replaced. That is as of Linux 5.8; seen
// is the file that tells of 5.14.
func repeats(index int) bool {
	_, err := os.Stat(filepath.Join(sysBlock, deviceName(index), "backend"))
	return err == nil
}

func (k *netlinkKernel) requestTime(index int, backend string, d time.Duration) error {
	_, err := k.call(cmdReconfigure, false, func(ae *netlink.AttributeEncoder) {
		ae.Uint32(attrIndex, uint32(index))
		ae.String(attrBackend, backend)
		ae.Uint64(attrTimeout, seconds(d))
	})
	if err != nil {
		return fmt.Errorf("set the request time of %s: %w", devicePath(index), err)
	}
	return nil
}

// Lost implements Kernel. With a request time, a request that the driver looks
// after is taken back instead of left to its connection, and taken can tell.
func (k *netlinkKernel) Lost(index int, backend string) error {
	if !repeats(index) {
		return nil
	}
	return k.requestTime(index, backend, lookEvery)
}

// Restored implements Kernel. The driver has made the request time a limit of
// sending too, which is for a server that is slow to read.
func (k *netlinkKernel) Restored(index int, backend string, fd int) error {
	if !repeats(index) {
		return nil
	}
	if fd >= 0 {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{}); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	return k.requestTime(index, backend, 0)
}

// Watch implements Kernel. The driver has set this to 30 s with the request time.
func (k *netlinkKernel) Watch(index int) error {
	if !repeats(index) {
		return nil
	}
	return setQueue(index, "io_timeout", lookEvery.Milliseconds())
}

// Reconnect implements Kernel.
func (k *netlinkKernel) Reconnect(index int, backend string, fd int) (bool, error) {
	_, err := k.call(cmdReconfigure, false, func(ae *netlink.AttributeEncoder) {
		ae.Uint32(attrIndex, uint32(index))
		ae.String(attrBackend, backend)
		sockets(ae, fd)
	})
	if err != nil {
		return false, fmt.Errorf("reconnect %s: %w", devicePath(index), err)
	}
	return taken(fd)
}

// taken tells whether the kernel has made a socket one of a device's: it sets
// the device's timeout as the socket's.
func taken(fd int) (bool, error) {
	tv, err := unix.GetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO)
	if err != nil {
		return false, os.NewSyscallError("getsockopt", err)
	}
	return tv.Sec > 0, nil
}

// Resize implements Kernel.
func (k *netlinkKernel) Resize(index int, backend string, bytes int64) error {
	_, err := k.call(cmdReconfigure, false, func(ae *netlink.AttributeEncoder) {
		ae.Uint32(attrIndex, uint32(index))
		ae.String(attrBackend, backend)
		ae.Uint64(attrSize, uint64(bytes))
	})
	return err
}

// Disconnect implements Kernel.
func (k *netlinkKernel) Disconnect(index int) error {
	_, err := k.call(cmdDisconnect, false, func(ae *netlink.AttributeEncoder) { ae.Uint32(attrIndex, uint32(index)) })
	if err != nil {
		return fmt.Errorf("disconnect %s: %w", devicePath(index), err)
	}
	return nil
}

// Connected implements Kernel.
func (k *netlinkKernel) Connected(index int) bool { return connected(index) }

// Find implements Kernel.
func (k *netlinkKernel) Find(backend string) (int, bool) { return find(backend) }
