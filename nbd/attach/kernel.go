package attach

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"firn.io/firn/internal/block"
)

// Kernel is the NBD driver, as a device uses it.
type Kernel interface {
	// Connect makes a device of sockets and returns its index.
	Connect(Setup) (index int, err error)
	// Reconnect gives a socket to a device in the place of a dead one. taken is
	// false if the device has none that is known to be dead.
	Reconnect(index int, backend string, fd int) (taken bool, err error)
	// Lost says that the connection of a device without a RequestTime is over: what
	// it has not answered is taken back, and sent on the next one.
	Lost(index int, backend string) error
	// Restored ends that, when fd has been taken; it is -1 if an older connection
	// turned out to live.
	Restored(index int, backend string, fd int) error
	// Watch makes the kernel look after the requests of a device without a
	// RequestTime. It may wait for all that are in flight.
	Watch(index int) error
	// Resize changes the size of a connected device.
	Resize(index int, backend string, bytes int64) error
	// Disconnect ends a device; its requests fail.
	Disconnect(index int) error
	// Connected tells whether a device is connected.
	Connected(index int) bool
	// Find returns the device that is connected to backend.
	Find(backend string) (index int, found bool)
	// Dead gets the index of a device when one of its connections has died.
	Dead() <-chan int
	Close() error
}

// Setup is what a device is connected with.
type Setup struct {
	// Index is negative for any free device.
	Index      int
	Bytes      int64
	BlockBytes int
	// Flags are the export's transmission flags.
	Flags uint64
	FDs   []int
	// Backend is shown as /sys/block/nbdN/backend.
	Backend string
	// RequestTime is 0 or at least a second: see Config.
	RequestTime time.Duration
	// DeadTime is 0 for ever.
	DeadTime time.Duration
}

// sysBlock is where the kernel shows its block devices.
const sysBlock = "/sys/block"

func deviceName(index int) string { return "nbd" + strconv.Itoa(index) }

func connected(index int) bool {
	_, err := os.Stat(filepath.Join(sysBlock, deviceName(index), "pid"))
	return err == nil
}

func find(backend string) (int, bool) {
	files, err := filepath.Glob(filepath.Join(sysBlock, "nbd*", "backend"))
	if err != nil {
		return -1, false
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil || strings.TrimSpace(string(text)) != backend {
			continue
		}
		index, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(filepath.Dir(file)), "nbd"))
		if err == nil && connected(index) {
			return index, true
		}
	}
	return -1, false
}

// loadModule loads the driver if it is not there.
func loadModule() error {
	if _, err := os.Stat("/sys/module/nbd"); err == nil {
		return nil
	}
	out, err := exec.Command("modprobe", "nbd").CombinedOutput()
	if err == nil {
		return nil
	}
	if _, statErr := os.Stat("/sys/module/nbd"); statErr == nil {
		return nil
	}
	return block.Errorf(block.Unsupported, "this kernel has no NBD driver loaded, and `modprobe nbd` failed (%v: %s); run `sudo modprobe nbd`, or use a kernel with CONFIG_BLK_DEV_NBD",
		err, strings.TrimSpace(string(out)))
}

// InUse tells why a device should not be disconnected: it is mounted, swapped
// on, or held by another driver. Processes that have it open are not seen.
func InUse(index int) (why string, err error) {
	f, err := os.OpenFile(devicePath(index), os.O_RDONLY|os.O_EXCL, 0)
	switch {
	case err == nil:
		return "", f.Close()
	case errors.Is(err, errBusy):
		return mountOf(index), nil
	case errors.Is(err, os.ErrNotExist):
		return "", nil
	}
	return "", err
}

// mountOf finds where a device, or a partition of it, is mounted.
func mountOf(index int) string {
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "in use"
	}
	path := devicePath(index)
	for _, line := range strings.Split(string(text), "\n") {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		source := fields[0]
		if at, err := filepath.EvalSymlinks(source); err == nil {
			source = at
		}
		if source == path || strings.HasPrefix(source, path+"p") {
			return "mounted at " + fields[1]
		}
	}
	return "in use (mounted elsewhere, swap, LVM or multipath)"
}

// Disconnect ends the device, of whichever process it is.
func Disconnect(index int) error {
	k, err := openKernel()
	if err != nil {
		return err
	}
	return errors.Join(k.Disconnect(index), k.Close())
}

// IsConnected tells whether a device is connected.
func IsConnected(index int) bool { return connected(index) }

// ParseDevice returns the index of "/dev/nbd3" or "nbd3", or of a link to one.
func ParseDevice(path string) (index int, ok bool) {
	if at, err := filepath.EvalSymlinks(path); err == nil {
		path = at
	}
	digits, ok := strings.CutPrefix(strings.TrimPrefix(path, "/dev/"), "nbd")
	if !ok {
		return 0, false
	}
	index, err := strconv.Atoi(digits)
	return index, err == nil && index >= 0
}
