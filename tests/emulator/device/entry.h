// From the pointers of cuLaunchKernel to a call. build.py writes the table that uses it.
#pragma once

namespace cuemu {

template <class T>
constexpr Parameter parameter() {
    if constexpr (std::is_pointer_v<T>) {
        using Target = std::remove_pointer_t<T>;
        if constexpr (std::is_void_v<Target>) return {'p', 0};
        else return {'p', sizeof(Target)};
    } else {
        const char kind = std::is_floating_point_v<T> ? 'f'
                          : !std::is_integral_v<T>    ? 's'
                          : std::is_signed_v<T>       ? 'i'
                                                      : 'u';
        return {kind, sizeof(T)};
    }
}

template <auto Function>
struct Entry;

template <class... Arguments, void (*Function)(Arguments...)>
struct Entry<Function> {
    static constexpr Parameter parameters[] = {parameter<Arguments>()..., {0, 0}};

    static void run(void** values) { call(values, std::index_sequence_for<Arguments...>()); }

private:
    template <size_t... I>
    static void call([[maybe_unused]] void** values, std::index_sequence<I...>) {
        Function(*static_cast<Arguments*>(values[I])...);
    }
};

// The first number of __launch_bounds__(threads, blocks, ...).
constexpr unsigned launch_bound(unsigned threads, ...) { return threads; }

} // namespace cuemu
